"""quantkit's rows beside its peers: which scheme and algorithm each name stands for."""

from __future__ import annotations

import json
from dataclasses import dataclass

from quantkit.mixture import candidate
from quantkit.schemes import SCHEMES

_FISHER = "{gptq: {fisher: 0.5, outputs: coupled}}"
_WEIGHT_ONLY = {
    "quantkit RTN": "rtn",
    "quantkit GPTQ": "gptq",
    "quantkit GPTQ, Fisher": _FISHER,
    "quantkit GPTQ, Fisher, distill": f"[{_FISHER}, distill]",
    "quantkit GPTQ, Fisher, distill 160 steps": f"[{_FISHER}, {{distill: {{steps: 160}}}}]",
    "quantkit GPTQ, Fisher, blocks, distill": f"[{_FISHER}, blockdistill, distill]",
}
_SMOOTH = "{smoothquant: {alpha: auto, pairs: all}}"
_ONLINE = "{rotate: {mlp: true}}"
_ONLY_ONLINE = "{rotate: {residual: false, heads: false, mlp: true}}"
_WITH_ACTIVATIONS = {
    "quantkit RTN": "rtn",
    "quantkit GPTQ": "gptq",
    "quantkit SmoothQuant, RTN": f"[{_SMOOTH}, rtn]",
    "quantkit SmoothQuant, GPTQ": f"[{_SMOOTH}, gptq]",
    "quantkit rotate, GPTQ": "[rotate, gptq]",
    "quantkit rotate only mlp, RTN": f"[{_ONLY_ONLINE}, rtn]",
    "quantkit rotate with mlp, RTN": f"[{_ONLINE}, rtn]",
    "quantkit rotate with mlp, GPTQ": f"[{_ONLINE}, gptq]",
}
_STATIC = {
    "quantkit RTN": "rtn",
    "quantkit GPTQ": "gptq",
    "quantkit SmoothQuant, RTN": f"[{_SMOOTH}, rtn]",
    "quantkit outliers, RTN": "[outliers, rtn]",
    "quantkit outliers, RTN, distill": "[outliers, rtn, distill]",
    "quantkit rotate with mlp, RTN": f"[{_ONLINE}, rtn]",
    "quantkit rotate with mlp, outliers, RTN": f"[{_ONLINE}, outliers, rtn]",
}

#: ``--scheme`` of a mixture → the stored bits a weight that it may take.
BUDGETS = {"mixed-3.25": 3.25, "mixed-4.5": 4.5, "mixed-5.5": 5.5}

#: ``--scheme`` of a mixture → what it is made of, where that is not `quantkit.mixture.CANDIDATES`.
INGREDIENTS = {
    "mixed-3.25": (
        "w2a16-g64", "w2a16-g32", "w2a16-asym-g32", "w3a16-g64", "w3a16-asym-g64", "w3a16-g32",
        "w4a16-g64", "w4a16-asym-g64", "w5a16-g64",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Ours:
    """One row.

    Attributes:
        scheme: a name of `quantkit.mixture.candidate`, or a key of `BUDGETS` for the mixture of
            least predicted KL within it.
        algorithm: as a recipe has it.
    """

    scheme: str
    algorithm: str

    @property
    def mixed(self) -> bool:
        return self.scheme in BUDGETS

    def recipe(self) -> str:
        """Of a uniform row; a mixture's is written by `quantkit inspect`."""
        _, scheme = candidate(self.scheme)
        return f"scheme: {json.dumps(scheme)}\nalgorithm: {self.algorithm}\nkeep: [lm_head]\n"


def _uniform(scheme: str, algorithms: dict[str, str]) -> dict[str, Ours]:
    return {name: Ours(scheme, algorithm) for name, algorithm in algorithms.items()}


#: Scheme, or budget of a mixture → name → row.
RECIPES: dict[str, dict[str, Ours]] = {
    "w4a16-g64": _uniform("w4a16-g64", _WEIGHT_ONLY),
    "w3a16-g64": _uniform("w3a16-g64", _WEIGHT_ONLY),
    "w2a16-g32": _uniform("w2a16-g32", _WEIGHT_ONLY),
    "w8a8": _uniform("w8a8", _WITH_ACTIVATIONS),
    "w8a8-static": _uniform("w8a8-static", _STATIC),
    "fp8": _uniform("fp8", _WITH_ACTIVATIONS),
    "fp8-static": _uniform("fp8-static", _STATIC),
    # A mixture beside what is uniform and takes as many bits, or one step less.
    "mixed-3.25": {
        "quantkit w3a16-g64, GPTQ": Ours("w3a16-g64", "gptq"),
        "quantkit mixture, GPTQ": Ours("mixed-3.25", "gptq"),
        "quantkit w3a16-g64, GPTQ, Fisher, distill": Ours("w3a16-g64", f"[{_FISHER}, distill]"),
        "quantkit mixture, GPTQ, Fisher, distill": Ours("mixed-3.25", f"[{_FISHER}, distill]"),
    },
    "mixed-4.5": {
        "quantkit w4a16-g64, GPTQ": Ours("w4a16-g64", "gptq"),
        "quantkit w4a16-g32, GPTQ": Ours("w4a16-g32", "gptq"),
        "quantkit mixture, GPTQ": Ours("mixed-4.5", "gptq"),
        "quantkit w4a16-g32, GPTQ, Fisher": Ours("w4a16-g32", _FISHER),
        "quantkit mixture, GPTQ, Fisher": Ours("mixed-4.5", _FISHER),
    },
    "mixed-5.5": {
        "quantkit w5a16-g64, RTN": Ours("w5a16-g64", "rtn"),
        "quantkit w5a16-g32, RTN": Ours("w5a16-g32", "rtn"),
        "quantkit w5a16-g64, GPTQ": Ours("w5a16-g64", "gptq"),
        "quantkit w5a16-g32, GPTQ": Ours("w5a16-g32", "gptq"),
        "quantkit mixture, GPTQ": Ours("mixed-5.5", "gptq"),
        "quantkit w5a16-g32, GPTQ, Fisher": Ours("w5a16-g32", _FISHER),
        "quantkit mixture, GPTQ, Fisher": Ours("mixed-5.5", _FISHER),
    },
}


def describe(scheme: str) -> str:
    """What ``--scheme`` means, for the results."""
    if scheme in BUDGETS:
        what = f"up to {BUDGETS[scheme]} bits a weight, uniform and mixed by measured sensitivity"
        return f"{scheme}, {what}, head kept"
    return f"{scheme}, {SCHEMES[scheme].describe()}, head kept"
