"""The quantization methods: name → module with ``quantize(weight, spec, stats) -> QuantTensor``.

``stats`` is None or any object with ``second_moment``, a float tensor ``[in]``: the mean square
of every input channel over the calibration tokens.  A new method is one file and one line here.
"""

METHODS = {"rtn": "zaya_quant.methods.rtn"}
