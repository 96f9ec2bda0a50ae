"""llama.cpp's CPU kernels, from a folder with its shared libraries, through their C interface."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from zaya_convert.bench.measure import Call
from zaya_convert.errors import InputError

_TYPES = {"Q4_0": 2, "Q8_0": 8, "Q4_K": 12}  # ggml.h
_F32, _I32 = 0, 26
# x86 has no other order of Q8_0, and the buffer does not survive being asked for it.
_REPACKED = ("Q4_0", "Q4_K")
_HEADROOM = 1 << 20  # for the descriptions of tensors and graphs
_REPACK = "CPU_REPACK"
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SILENT = _LOG(lambda level, text, data: None)


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


def load(folder: Path) -> Libraries:
    """Load ``libggml-base`` and ``libggml-cpu`` from anywhere below a folder.

    Raises:
        InputError: they are not there, or do not load.
    """
    loaded: list[ctypes.CDLL] = []
    for name in ("libggml-base.so", "libggml-cpu.so"):
        path = next(iter(sorted(folder.rglob(name))), None)
        if path is None:
            raise InputError(f"has no {name}: build llama.cpp with BUILD_SHARED_LIBS", str(folder))
        try:
            loaded.append(ctypes.CDLL(str(path.resolve()), mode=ctypes.RTLD_GLOBAL))
        except OSError as error:
            raise InputError(f"does not load: {error}", str(path)) from None
    return Libraries(*loaded)


class Libraries:
    """ggml, loaded."""

    def __init__(self, base: ctypes.CDLL, cpu: ctypes.CDLL) -> None:
        self._base, self._cpu = base, cpu
        pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        signatures: dict[str, tuple[ctypes.CDLL, Any, list[Any]]] = {
            "ggml_init": (base, pointer, [_InitParams]),
            "ggml_new_tensor_2d": (base, pointer, [pointer, i32, i64, i64]),
            "ggml_new_tensor_3d": (base, pointer, [pointer, i32, i64, i64, i64]),
            "ggml_mul_mat": (base, pointer, [pointer, pointer, pointer]),
            "ggml_mul_mat_id": (base, pointer, [pointer, pointer, pointer, pointer]),
            "ggml_swiglu": (base, pointer, [pointer, pointer]),
            "ggml_log_set": (base, None, [_LOG, pointer]),
            "ggml_new_graph": (base, pointer, [pointer]),
            "ggml_build_forward_expand": (base, None, [pointer, pointer]),
            "ggml_nbytes": (base, ctypes.c_size_t, [pointer]),
            "ggml_backend_alloc_ctx_tensors_from_buft": (base, pointer, [pointer, pointer]),
            "ggml_backend_tensor_set":
                (base, None, [pointer, pointer, ctypes.c_size_t, ctypes.c_size_t]),
            "ggml_backend_graph_compute": (base, i32, [pointer, pointer]),
            "ggml_backend_get_default_buffer_type": (base, pointer, [pointer]),
            "ggml_backend_buft_name": (base, ctypes.c_char_p, [pointer]),
            "ggml_backend_reg_get_proc_address": (base, pointer, [pointer, ctypes.c_char_p]),
            "ggml_backend_reg_dev_get": (base, pointer, [pointer, ctypes.c_size_t]),
            "ggml_backend_cpu_init": (cpu, pointer, []),
            "ggml_backend_cpu_reg": (cpu, pointer, []),
            "ggml_backend_cpu_set_n_threads": (cpu, None, [pointer, i32]),
        }  # fmt: skip
        for name, (owner, result, arguments) in signatures.items():
            function = getattr(owner, name)
            function.restype, function.argtypes = result, arguments
        base.ggml_log_set(_SILENT, None)
        self._plain = base.ggml_backend_get_default_buffer_type(cpu.ggml_backend_cpu_init())

    def products(
        self, kind: str, rows: int, count: int, x: Tensor, threads: int
    ) -> Iterator[tuple[str, list[Call]]]:
        """``x @ weight.T`` on matrices of a block type: as they are stored, and repacked.

        Args:
            kind: "Q4_0", "Q4_K" or "Q8_0".
            rows: outputs.
            count: matrices, each with a call of its own.
            x: [n, in] fp32.
        """
        base = self._base
        for name, place in self._places(kind):
            calls: list[Call] = []
            for _ in range(count):
                held = base.ggml_init(_InitParams(_HEADROOM, None, True))
                weight = base.ggml_new_tensor_2d(held, _TYPES[kind], x.shape[1], rows)
                self._fill(held, [weight], place)
                passing = base.ggml_init(_InitParams(_HEADROOM, None, True))
                inputs = base.ggml_new_tensor_2d(passing, _F32, x.shape[1], x.shape[0])
                output = base.ggml_mul_mat(passing, weight, inputs)
                calls.append(self._graph(passing, output, threads))
                self._set(inputs, x.float())
            yield name, calls

    def experts(
        self, kind: str, count: int, x: Tensor, threads: int
    ) -> Iterator[tuple[str, Callable[[Tensor], Call]]]:
        """The top-1 FFN as llama.cpp builds it: gate and up in one product, SwiGLU, down.

        Args:
            kind: "Q4_0", "Q4_K" or "Q8_0".
            count: experts, whose inner width is that of x.
            x: [n, width] fp32.

        Yields:
            A name, and from the experts [n] of the rows to a call.
        """
        base = self._base
        n, width = x.shape
        for name, place in self._places(kind):
            held = base.ggml_init(_InitParams(_HEADROOM, None, True))
            gate_up, down = (
                base.ggml_new_tensor_3d(held, _TYPES[kind], width, rows, count)
                for rows in (2 * width, width)
            )
            self._fill(held, [gate_up, down], place)
            passing = base.ggml_init(_InitParams(_HEADROOM, None, True))
            inputs = base.ggml_new_tensor_3d(passing, _F32, width, 1, n)
            chosen = base.ggml_new_tensor_2d(passing, _I32, 1, n)
            both = base.ggml_mul_mat_id(passing, gate_up, inputs, chosen)
            inner = base.ggml_swiglu(passing, both)
            output = base.ggml_mul_mat_id(passing, down, inner, chosen)
            compute = self._graph(passing, output, threads)
            self._set(inputs, x.float())

            def call_of(ids: Tensor, chosen: int = chosen, compute: Call = compute) -> Call:
                own = ids.int()

                def call() -> None:
                    self._set(chosen, own)
                    compute()

                return call

            yield name, call_of

    def _places(self, kind: str) -> Iterator[tuple[str, int]]:
        """Where matrices of a type may lie, by name."""
        yield f"ggml {kind}", self._plain
        if kind in _REPACKED and (repacked := self._repack_type()) is not None:
            yield f"ggml {kind} repacked", repacked

    def _fill(self, held: int, tensors: list[int], place: int) -> None:
        """Give tensors memory, and zeros: speed does not depend on what they hold."""
        self._base.ggml_backend_alloc_ctx_tensors_from_buft(held, place)
        for tensor in tensors:
            size = self._base.ggml_nbytes(tensor)
            zeros = ctypes.create_string_buffer(size)
            self._base.ggml_backend_tensor_set(tensor, zeros, 0, size)

    def _set(self, tensor: int, values: Tensor) -> None:
        values = values.contiguous()
        self._base.ggml_backend_tensor_set(tensor, values.data_ptr(), 0, values.nbytes)

    def _graph(self, passing: int, output: int, threads: int) -> Call:
        """A call that computes ``output``; all other tensors of its context get memory."""
        base, cpu = self._base, self._cpu
        graph = base.ggml_new_graph(passing)
        base.ggml_build_forward_expand(graph, output)
        base.ggml_backend_alloc_ctx_tensors_from_buft(passing, self._plain)
        backend = cpu.ggml_backend_cpu_init()
        cpu.ggml_backend_cpu_set_n_threads(backend, threads)
        return lambda: base.ggml_backend_graph_compute(backend, graph)

    def _repack_type(self) -> int | None:
        """The buffers whose matrices are repacked, where this build and machine have them."""
        registry = self._cpu.ggml_backend_cpu_reg()
        address = self._base.ggml_backend_reg_get_proc_address(
            registry, b"ggml_backend_dev_get_extra_bufts"
        )
        if not address:
            return None
        kind = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)
        found = kind(address)(self._base.ggml_backend_reg_dev_get(registry, 0))
        index = 0
        while found and found[index]:
            if self._base.ggml_backend_buft_name(found[index]).decode() == _REPACK:
                return found[index]
            index += 1
        return None
