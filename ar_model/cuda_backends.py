"""Attention kernels that need CUDA: xformers and FlexAttention.

Legend: B batch, N heads, Q queries, K keys, H width of a head.
"""

import ctypes
import functools
import math
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import torch
from torch import Tensor

from ar_model.attention_mask import BlockMask, Mask, bias_of


def xformers(q_BNQH: Tensor, k_BNKH: Tensor, v_BNKH: Tensor, mask: Mask) -> Tensor:
    """Compute attention with memory_efficient_attention of xformers. Raises a ValueError on other devices than CUDA."""
    _check_cuda("xformers", q_BNQH)
    ops = _XFORMERS[0] if _XFORMERS else import_xformers()
    q, k, v = (x.transpose(1, 2) for x in (q_BNQH, k_BNKH, v_BNKH))
    return ops.memory_efficient_attention(q, k, v, attn_bias=xformers_bias(ops, q, k, mask)).transpose(1, 2)


def xformers_bias(ops: Any, q_BQNH: Tensor, k_BKNH: Tensor, mask: Mask) -> Any:
    """Return the mask as `ops.memory_efficient_attention` takes it: a bias (B, N, Q, K), a causal mask, or None."""
    if mask is None:
        return None
    if mask.causal:
        # Needs no bias, which takes time to read, and which some kernels of xformers do not accept.
        return ops.LowerTriangularMask()
    batch, queries, heads = q_BQNH.shape[:3]
    keys = k_BKNH.shape[1]
    # The kernels need bias rows that start at multiples of 8 elements: allocate wider rows and slice.
    bias_QK = q_BQNH.new_zeros(queries, math.ceil(keys / 8) * 8)[:, :keys]
    return bias_QK.copy_(bias_of(mask, q_BQNH.device, q_BQNH.dtype)).expand(batch, heads, queries, keys)


@functools.cache
def import_xformers() -> Any:
    """Import and return xformers.ops, after loading the CUDA 12 runtime if PyTorch brings another one.

    The wheels of xformers 0.0.34 and 0.0.35 are linked against CUDA 12. On a CUDA 13 build of PyTorch they refuse every operator,
    although the attention kernel is PyTorch's own. The package nvidia-cuda-runtime-cu12 provides the missing library.
    """
    if (torch.version.cuda or "").split(".")[0] != "12":
        with suppress(PackageNotFoundError, OSError):
            library = distribution("nvidia-cuda-runtime-cu12").locate_file("nvidia/cuda_runtime/lib/libcudart.so.12")
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    # Not at the top of the module: on machines without CUDA this import prints a warning.
    import xformers.ops

    _XFORMERS.append(xformers.ops)
    return xformers.ops


_XFORMERS: list[Any] = []
"""The module xformers.ops once it is imported: a compiled graph can read it here, but would break at an import."""


def flex(q_BNQH: Tensor, k_BNKH: Tensor, v_BNKH: Tensor, mask: Mask) -> Tensor:
    """Compute attention with FlexAttention of PyTorch. Raises a ValueError on other devices than CUDA."""
    _check_cuda("flex", q_BNQH)
    return flex_anywhere(q_BNQH, k_BNKH, v_BNKH, mask)


def flex_anywhere(q_BNQH: Tensor, k_BNKH: Tensor, v_BNKH: Tensor, mask: Mask) -> Tensor:
    """Do what `flex` does, without the check of the device, so that its graphs can be tested on a CPU."""
    if torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(q_BNQH, k_BNKH, v_BNKH, block_mask=_flex_mask(mask, q_BNQH.device))
    # Encoder, decoder, training, evaluation and batch sizes give more shapes than dynamo's default limit of 8 recompilations.
    # Some versions of DDP's optimizer of graphs refuse FlexAttention.
    with torch._dynamo.config.patch(recompile_limit=64, optimize_ddp=False):
        return _compiled_flex()(q_BNQH, k_BNKH, v_BNKH, block_mask=_flex_mask(mask, q_BNQH.device))


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Without compilation, flex_attention materialises the whole score matrix.
    return torch.compile(flex_attention, dynamic=False)


_FLEX_MASKS: dict[tuple[int, int, int, str, int | None], Any] = {}
"""Masks of FlexAttention that were made outside of a compiled graph, by block counts and device. A compiled graph reads them as
inputs; a function with a cache of its own would be traced again in every layer."""


def _flex_mask(mask: Mask, device: torch.device) -> Any:
    if mask is None:
        return None
    key = (mask.blocks, mask.queries, mask.keys, device.type, device.index)
    if key in _FLEX_MASKS:
        return _FLEX_MASKS[key]
    if torch.compiler.is_compiling():
        return _make_flex_mask(mask, device)
    # A tensor made in inference mode could not be used in training later.
    with torch.inference_mode(False):
        return _FLEX_MASKS.setdefault(key, _make_flex_mask(mask, device))


def _make_flex_mask(mask: BlockMask, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, n: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q // mask.queries >= k // mask.keys

    queries, keys = mask.blocks * mask.queries, mask.blocks * mask.keys
    return create_block_mask(visible, None, None, queries, keys, device=str(device))


def _check_cuda(name: str, x: Tensor) -> None:
    if x.device.type != "cuda":
        raise ValueError(f"attention {name} needs a CUDA device, got {x.device.type}")
