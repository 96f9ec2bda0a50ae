// Asks a llama.cpp build for logits, token ids or a greedy continuation of a GGUF model, through its
// public C interface (llama.h) alone.
//
//   probe logits MODEL IDS OUT [--kv-f32] [--threads N]   IDS: token ids, one sequence a line.
//       OUT: float32 [tokens, vocabulary] of all sequences, one after the other.
//   probe tokens MODEL [--bos]                            stdin: base64 texts, one a line.
//       stdout: token ids, one line a text; special tokens in a text are recognised.
//   probe generate MODEL COUNT [--kv-f32] [--threads N]   stdin: token ids of the prompt.
//       stdout: a line of COUNT ids, then the text of these ids.
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <limits>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "llama.h"

namespace {

using Ids = std::vector<llama_token>;

[[noreturn]] void fail(const std::string& message) { throw std::runtime_error(message); }

struct Options {
    std::vector<std::string> words;
    bool kv_f32 = false;
    bool bos = false;
    int32_t threads = 2;
};

int64_t whole_number(const std::string& text, int64_t low, int64_t high, const std::string& what) {
    size_t used = 0;
    long long value = 0;
    try {
        value = std::stoll(text, &used);
    } catch (const std::exception&) {
        used = 0;
    }
    if (used == 0 || used != text.size() || value < low || value > high)
        fail(what + ": '" + text + "' is not a whole number from " + std::to_string(low) + " to " +
             std::to_string(high));
    return value;
}

Options parse(int count, char** values) {
    Options options;
    for (int i = 1; i < count; i++) {
        const std::string word = values[i];
        if (word == "--kv-f32") {
            options.kv_f32 = true;
        } else if (word == "--bos") {
            options.bos = true;
        } else if (word == "--threads") {
            if (++i == count) fail("--threads needs a number");
            options.threads = static_cast<int32_t>(whole_number(values[i], 1, 512, word));
        } else if (word.rfind("--", 0) == 0) {
            fail("unknown option " + word);
        } else {
            options.words.push_back(word);
        }
    }
    return options;
}

// Model and context -----------------------------------------------------------------------------

struct FreeModel {
    void operator()(llama_model* model) const { llama_model_free(model); }
};
struct FreeContext {
    void operator()(llama_context* context) const { llama_free(context); }
};
using ModelPtr = std::unique_ptr<llama_model, FreeModel>;
using ContextPtr = std::unique_ptr<llama_context, FreeContext>;

// Warnings and errors only; a continuation belongs to the message before it.
void log_line(ggml_log_level level, const char* text, void*) {
    static bool shown = false;
    if (level != GGML_LOG_LEVEL_CONT) shown = level >= GGML_LOG_LEVEL_WARN;
    if (shown) std::fputs(text, stderr);
}

ModelPtr load(const std::string& path, bool vocabulary_only) {
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = 0;
    params.vocab_only = vocabulary_only;
    ModelPtr model(llama_model_load_from_file(path.c_str(), params));
    if (!model) fail("llama.cpp cannot load " + path);
    return model;
}

// Room for `length` tokens of one sequence, in one batch.
ContextPtr open_context(llama_model* model, size_t length, const Options& options) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = static_cast<uint32_t>(length);
    params.n_seq_max = 1;
    params.n_threads = params.n_threads_batch = options.threads;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.offload_kqv = params.op_offload = false;
    params.swa_full = true;
    if (options.kv_f32) params.type_k = params.type_v = GGML_TYPE_F32;
    ContextPtr context(llama_init_from_model(model, params));
    if (!context) fail("llama.cpp cannot make a context of " + std::to_string(length) + " tokens");
    return context;
}

class Batch {
public:
    explicit Batch(size_t length) : batch_(llama_batch_init(static_cast<int32_t>(length), 0, 1)) {}
    ~Batch() { llama_batch_free(batch_); }
    Batch(const Batch&) = delete;
    Batch& operator=(const Batch&) = delete;

    // Runs `ids` after the `past` tokens that the context holds already; every position has logits.
    void decode(llama_context* context, const Ids& ids, size_t past) {
        batch_.n_tokens = static_cast<int32_t>(ids.size());
        for (size_t i = 0; i < ids.size(); i++) {
            batch_.token[i] = ids[i];
            batch_.pos[i] = static_cast<llama_pos>(past + i);
            batch_.n_seq_id[i] = 1;
            batch_.seq_id[i][0] = 0;
            batch_.logits[i] = 1;
        }
        const int32_t status = llama_decode(context, batch_);
        if (status != 0) fail("llama_decode returned " + std::to_string(status));
    }

private:
    llama_batch batch_;
};

const float* logits_at(llama_context* context, size_t position) {
    const float* row = llama_get_logits_ith(context, static_cast<int32_t>(position));
    if (row == nullptr) fail("no logits at position " + std::to_string(position));
    return row;
}

const llama_vocab* vocabulary(const ModelPtr& model) { return llama_model_get_vocab(model.get()); }

// Input and output ------------------------------------------------------------------------------

Ids parse_ids(const std::string& line, int32_t vocabulary_size) {
    std::istringstream words(line);
    Ids ids;
    for (std::string word; words >> word;)
        ids.push_back(
            static_cast<llama_token>(whole_number(word, 0, vocabulary_size - 1, "token id")));
    if (ids.empty()) fail("a sequence without token ids");
    return ids;
}

std::vector<Ids> read_sequences(const std::string& path, int32_t vocabulary_size) {
    std::ifstream file(path);
    if (!file) fail("cannot read " + path);
    std::vector<Ids> sequences;
    for (std::string line; std::getline(file, line);)
        sequences.push_back(parse_ids(line, vocabulary_size));
    if (sequences.empty()) fail(path + " holds no sequences");
    return sequences;
}

int base64_value(char letter) {
    static const std::string alphabet =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const size_t value = alphabet.find(letter);
    if (value == std::string::npos) fail("stdin: not base64");
    return static_cast<int>(value);
}

std::string base64_decode(std::string line) {
    while (!line.empty() && (line.back() == '\r' || line.back() == '=')) line.pop_back();
    std::string text;
    uint32_t bits = 0;
    int held = 0;
    for (const char letter : line) {
        bits = (bits << 6) | static_cast<uint32_t>(base64_value(letter));
        held += 6;
        if (held >= 8) {
            held -= 8;
            text.push_back(static_cast<char>((bits >> held) & 0xff));
        }
    }
    return text;
}

void print_ids(const Ids& ids) {
    for (size_t i = 0; i < ids.size(); i++) std::cout << (i == 0 ? "" : " ") << ids[i];
    std::cout << '\n';
}

// Tokens ----------------------------------------------------------------------------------------

void need_tokenizer(const llama_vocab* vocab) {
    if (llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE) fail("the model has no tokenizer");
}

Ids tokenize(const llama_vocab* vocab, const std::string& text, bool add_bos) {
    const int32_t length = static_cast<int32_t>(text.size());
    Ids ids(text.size() + 2);
    int32_t count = llama_tokenize(vocab, text.data(), length, ids.data(),
                                   static_cast<int32_t>(ids.size()), add_bos, true);
    if (count == std::numeric_limits<int32_t>::min()) fail("a text is too long");
    if (count < 0) {
        ids.resize(static_cast<size_t>(-count));
        count = llama_tokenize(vocab, text.data(), length, ids.data(), -count, add_bos, true);
    }
    if (count < 0) fail("llama_tokenize returned " + std::to_string(count));
    ids.resize(static_cast<size_t>(count));
    return ids;
}

// llama_detokenize would also tidy up spaces; the pieces are the text itself.
std::string piece(const llama_vocab* vocab, llama_token id) {
    std::string text(64, '\0');
    int32_t size = llama_token_to_piece(vocab, id, &text[0], 64, 0, true);
    if (size < 0) {
        text.resize(static_cast<size_t>(-size));
        size = llama_token_to_piece(vocab, id, &text[0], -size, 0, true);
    }
    if (size < 0) fail("token " + std::to_string(id) + " has no piece");
    text.resize(static_cast<size_t>(size));
    return text;
}

// Commands --------------------------------------------------------------------------------------

void write_logits(const Options& options) {
    if (options.words.size() != 4) fail("usage: logits MODEL IDS OUT [--kv-f32] [--threads N]");
    const ModelPtr model = load(options.words[1], false);
    const int32_t width = llama_vocab_n_tokens(vocabulary(model));
    const std::vector<Ids> sequences = read_sequences(options.words[2], width);
    size_t longest = 0;
    for (const Ids& ids : sequences) longest = ids.size() > longest ? ids.size() : longest;
    const ContextPtr context = open_context(model.get(), longest, options);
    Batch batch(longest);
    std::ofstream out(options.words[3], std::ios::binary);
    for (const Ids& ids : sequences) {
        llama_memory_clear(llama_get_memory(context.get()), true);
        batch.decode(context.get(), ids, 0);
        for (size_t i = 0; i < ids.size(); i++)
            out.write(reinterpret_cast<const char*>(logits_at(context.get(), i)),
                      static_cast<std::streamsize>(width) * 4);
    }
    out.close();
    if (!out) fail("cannot write " + options.words[3]);
}

void print_tokens(const Options& options) {
    if (options.words.size() != 2) fail("usage: tokens MODEL [--bos]");
    const ModelPtr model = load(options.words[1], true);
    need_tokenizer(vocabulary(model));
    for (std::string line; std::getline(std::cin, line);)
        print_ids(tokenize(vocabulary(model), base64_decode(line), options.bos));
}

llama_token largest(const float* row, int32_t width) {
    llama_token best = 0;
    for (llama_token id = 1; id < width; id++) best = row[id] > row[best] ? id : best;
    return best;
}

void print_continuation(const Options& options) {
    if (options.words.size() != 3) fail("usage: generate MODEL COUNT [--kv-f32] [--threads N]");
    const size_t count = static_cast<size_t>(whole_number(options.words[2], 1, 1 << 20, "COUNT"));
    const ModelPtr model = load(options.words[1], false);
    const llama_vocab* vocab = vocabulary(model);
    const int32_t width = llama_vocab_n_tokens(vocab);
    const std::string input{std::istreambuf_iterator<char>(std::cin), {}};
    Ids next = parse_ids(input, width);
    const ContextPtr context = open_context(model.get(), next.size() + count, options);
    Batch batch(next.size());
    Ids made;
    for (size_t past = 0; made.size() < count; past += next.size(), next = {made.back()}) {
        batch.decode(context.get(), next, past);
        made.push_back(largest(logits_at(context.get(), next.size() - 1), width));
    }
    print_ids(made);
    if (llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE) return;
    for (const llama_token id : made) std::cout << piece(vocab, id);
}

void run(const Options& options) {
    const std::string command = options.words.empty() ? "" : options.words[0];
    if (command == "logits") return write_logits(options);
    if (command == "tokens") return print_tokens(options);
    if (command == "generate") return print_continuation(options);
    fail("usage: probe logits | tokens | generate MODEL ...");
}

}  // namespace

int main(int count, char** values) {
    llama_log_set(log_line, nullptr);
    try {
        const Options options = parse(count, values);
        ggml_backend_load_all();
        llama_backend_init();
        run(options);
        llama_backend_free();
        std::cout.flush();
        if (!std::cout) fail("cannot write to stdout");
    } catch (const std::exception& error) {
        std::cerr << "probe: " << error.what() << '\n';
        return 1;
    }
    return 0;
}
