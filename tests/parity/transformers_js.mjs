// What transformers.js makes of a model folder.
//
//     node transformers_js.mjs LIBRARY MODEL < request.json > answer.json
//
// LIBRARY: a folder with node_modules/@huggingface/transformers. The request holds `batches` of user
// messages and `newTokens`; the answer, for each batch, what the tokenizer made of it (`ids`, `mask`)
// and greedily generated token ids, up to a stop token (`stopped`) and beyond (`endless`); and, from
// the first message of each batch, `continued`: both halves of `endless`, with the states kept.

import { createRequire } from "node:module";
import { join } from "node:path";
import { text } from "node:stream/consumers";

const [library, folder] = process.argv.slice(2);
const { AutoModelForCausalLM, AutoTokenizer, env, ones_like } = createRequire(
    join(library, "x"),
)("@huggingface/transformers");
env.allowRemoteModels = false;

const { batches, newTokens } = JSON.parse(await text(process.stdin));
const tokenizer = await AutoTokenizer.from_pretrained(folder);
const model = await AutoModelForCausalLM.from_pretrained(folder);
const greedy = { do_sample: false, max_new_tokens: newTokens };

const rows = (tensor) => tensor.tolist().map((row) => row.map(Number));
const tail = (tensor, start) => rows(tensor).map((row) => row.slice(start));

function encode(messages) {
    const texts = messages.map((content) =>
        tokenizer.apply_chat_template([{ role: "user", content }], {
            add_generation_prompt: true,
            tokenize: false,
        }),
    );
    return tokenizer(texts, { add_special_tokens: false, padding: true });
}

async function answer(messages) {
    const inputs = encode(messages);
    const width = inputs.input_ids.dims[1];
    const endless = { ...greedy, eos_token_id: null };
    return {
        ids: rows(inputs.input_ids),
        mask: rows(inputs.attention_mask),
        stopped: tail(await model.generate({ ...inputs, ...greedy }), width),
        endless: tail(await model.generate({ ...inputs, ...endless }), width),
        continued: await halves(encode(messages.slice(0, 1)), endless),
    };
}

async function halves(inputs, options) {
    const half = { ...options, max_new_tokens: newTokens / 2, return_dict_in_generate: true };
    const first = await model.generate({ ...inputs, ...half });
    const second = await model.generate({
        input_ids: first.sequences,
        attention_mask: ones_like(first.sequences),
        past_key_values: first.past_key_values,
        ...half,
    });
    return tail(second.sequences, inputs.input_ids.dims[1])[0];
}

const answers = [];
for (const messages of batches) answers.push(await answer(messages));
process.stdout.write(JSON.stringify(answers));
