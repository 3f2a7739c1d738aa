"""Hand-written Triton kernels, each beside its plain PyTorch definition.

    import kernels
    sample = getattr(kernels, "sample_chain", plain)        # a script's own function where this is absent

Nothing heavy is imported until a name is used. On a CUDA or ROCm tensor with Triton installed and a shape that the
kernel takes, the kernel runs; elsewhere PyTorch does. The environment variable KERNELS forces one of them:
    KERNELS=torch    never a kernel
    KERNELS=triton   always the kernel, an error where it cannot run (on a CPU it needs TRITON_INTERPRET=1)
`kernels.backend(x)` says which it is for a tensor: "triton" or "torch".
"""

import importlib

_HOME = {
    "backend": "_runtime",
    "sample_chain": "diffusion",
    "sample_chain_reference": "diffusion",
    "diffusion_step": "diffusion",
    "diffusion_step_reference": "diffusion",
    "langevin_chain": "langevin",
    "langevin_chain_reference": "langevin",
    "langevin_step": "langevin",
    "langevin_step_reference": "langevin",
    "nearest_code": "quantize",
    "nearest_code_reference": "quantize",
    "nearest_point": "chamfer",
    "nearest_point_reference": "chamfer",
    "chamfer_distance": "chamfer",
    "causal_attention": "attention",
    "causal_attention_reference": "attention",
    "decode_attention": "attention",
    "decode_attention_reference": "attention",
    "selective_scan": "scan",
    "selective_scan_reference": "scan",
    "wavefront_sample": "wavefront",
    "wavefront_sample_reference": "wavefront",
    "rational_quadratic": "spline",
    "rational_quadratic_reference": "spline",
    "residual_mlp": "mlp",
    "residual_mlp_reference": "mlp",
    "philox": "rng",
    "normal": "rng",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"kernels has no {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__():
    return __all__
