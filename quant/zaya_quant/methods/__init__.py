"""The quantization methods. A new one is one file and one line here.

A method's module has ``quantize(weight, spec, stats) -> Quantized``; ``stats`` is a
``zaya_quant.stats.InputStats`` or None. ``needs`` says what it must hold: "" (stats are not looked
at), "second_moment", "hessian", or "drift" (a Hessian, and the drift if there is any).
"""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_quant.qtensor import Quantized
    from zaya_quant.spec import Spec
    from zaya_quant.stats import InputStats

    Quantize = Callable[[Tensor, Spec, InputStats | None], Quantized]


class Method(NamedTuple):
    """One row of the table: the module, and what its ``stats`` must hold."""

    module: str
    needs: str = ""

    @property
    def on_prefix(self) -> bool:
        """Whether it wants inputs as the layers quantized before make them."""
        return self.needs in ("hessian", "drift")


METHODS = {
    "rtn": Method("zaya_quant.methods.rtn"),
    "absmax": Method("zaya_quant.methods.absmax"),
    "imatrix": Method("zaya_quant.methods.imatrix", "second_moment"),
    "gptq": Method("zaya_quant.methods.gptq", "hessian"),
    "gptaq": Method("zaya_quant.methods.gptaq", "drift"),
}


def method(name: str) -> "Quantize":
    """The function behind a name; imports torch."""
    return cast("Quantize", importlib.import_module(METHODS[name].module).quantize)
