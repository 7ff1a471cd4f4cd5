"""Why the scale does not pass an operation without a rule, in words."""

from __future__ import annotations

import re

from lightning_normdyn.invariance.rules.operation import Operation

# Names without ``Backward0``. Functions with f(cx) != c^k f(x), for any k.
NOT_HOMOGENEOUS = """
    Softmax LogSoftmax SafeSoftmax MaskedSoftmax SparseSoftmax SparseLogSoftmax
    Logsumexp Logcumsumexp Logaddexp Logaddexp2
    Gelu Silu Sigmoid Tanh Softplus Elu Celu Hardtanh Hardswish Hardsigmoid Hardshrink Softshrink
    Mish LogSigmoid Logit Threshold
    Exp Exp2 Expm1 Log Log2 Log10 Log1P Xlogy SpecialXlog1Py SpecialEntr Erf Erfc Erfinv
    SpecialErfcx SpecialLogNdtr SpecialNdtri
    Sin Cos Tan Sinc Asin Acos Atan Sinh Cosh Asinh Acosh Atanh
    Lgamma Digamma Polygamma Mvlgamma I0 SpecialI0E SpecialI1 SpecialI1E
    Prod Cumprod Round Floor Ceil Trunc Frac Fmod Remainder Renorm
    NllLoss NllLoss2D MseLoss SmoothL1Loss HuberLoss BinaryCrossEntropy
    BinaryCrossEntropyWithLogits SoftMarginLoss MultiMarginLoss MultilabelMarginLoss
    CtcLoss CudnnCtcLoss MiopenCtcLoss
"""

# Rows could be followed through some of these in principle. Each is rare in front of a
# normalization, and a rule that is wrong would cost more than a target that is missed. ``Linalg``
# stands for all that begin so.
NOT_FOLLOWED = {
    "is a whole recurrent layer, whose gates do not commute with a change of scale": """
        MkldnnRnnLayer CudnnRnn MiopenRnn LstmMps ThnnFusedLstmCell ThnnFusedGruCell
    """,
    "writes into a part of a tensor in place (`x[i] = y`), and that is not followed": """
        CopySlices SelectScatter SliceScatter DiagonalScatter AsStridedScatter MaskedScatter Scatter
        IndexCopy IndexFill Put Fill
    """,
    "reads memory in another layout (`as_strided`), and rows are not followed through it": """
        AsStrided
    """,
    "multiplies groups of rows with one matrix each (experts), and rows are not followed through "
    "it": """
        GroupedMm ScaledGroupedMm ForeachMm
    """,
    "is a Fourier transform, and complex numbers are not followed": """
        FftC2C FftR2C FftC2R
    """,
    "computes with complex numbers, and these are not followed": """
        ViewAsComplex ViewAsReal Complex Conj ConjPhysical Angle Polar
    """,
    "factors, inverts or solves with a matrix, and rows are not followed through it": """
        Linalg Cholesky CholeskyInverse CholeskySolve Geqrf Ormqr LuUnpack TriangularSolve
    """,
    "changes the layout of a sparse tensor, and rows are not followed through it": """
        ToSparse ToSparseCsr ToSparseCsc ToSparseBsr ToSparseBsc ToDense ToPaddedTensor Coalesce
        Values SparseMask SparseSum
    """,
}


def why_not(operation: Operation) -> str:
    """Why the scale does not pass an operation without a rule."""
    nested = "AutogradNestedTensor"
    kind = re.sub(rf"({nested})?Backward({nested})?\d*$", "", operation.name)
    if kind in NOT_HOMOGENEOUS.split():
        return f"{operation.place} does not commute with a change of scale"
    family = "Linalg" if kind.startswith("Linalg") else kind
    for what, kinds in NOT_FOLLOWED.items():
        if family in kinds.split():
            return f"{operation.place} {what}"
    if "Nested" in operation.name:
        return f"{operation.place} works on a nested tensor, whose rows are not followed"
    return f"no rule for {operation.place} (`register_rule` adds one)"
