"""The theory behind the methods: criteria and smoothness measured on gradients, random sketches,
and quadratics on which everything has a closed form.

``sketches`` and ``quadratic`` are the objects of the MAST and IST papers, ``iterations`` their
methods as short loops over quadratics: what a method for neural networks is tested against.
"""

from maskedtrain.theory.iterations import (
    distributed_double_sketched_gd,
    double_sketched_gd,
    double_sketched_sgd,
    ist,
    l_svrdsg,
    s_page,
)
from maskedtrain.theory.quadratic import (
    Quadratic,
    average,
    dsgd_bound,
    ist_expected_hessian,
    ist_fixed_point,
    ist_gradient,
    ist_hessian,
    ist_w_bar,
    mast_objective,
    preconditioned,
    sketched_gradient,
)
from maskedtrain.theory.sketches import Bernoulli, Perm, RandK, Sketch, SketchConstants
from maskedtrain.theory.smoothness import Smoothness, smoothness

__all__ = [
    "Bernoulli",
    "Perm",
    "Quadratic",
    "RandK",
    "Sketch",
    "SketchConstants",
    "Smoothness",
    "average",
    "distributed_double_sketched_gd",
    "double_sketched_gd",
    "double_sketched_sgd",
    "dsgd_bound",
    "ist",
    "ist_expected_hessian",
    "ist_fixed_point",
    "ist_gradient",
    "ist_hessian",
    "ist_w_bar",
    "l_svrdsg",
    "mast_objective",
    "preconditioned",
    "s_page",
    "sketched_gradient",
    "smoothness",
]
