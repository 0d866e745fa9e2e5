"""Random numbers that are a pure function of (seed, what they are used for): Philox4x32-10.

Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.  One draw gives four 32-bit numbers,
its *lanes*.  The key is the 64-bit seed (low word, high word), the counter is (block, position, sample low word, sample
high word).  Nothing else goes in: not the batch size, not the thread, not the order in which samples are drawn.

What is drawn where:

=================================  ==============  ==========  =======================================================
used for                           position        block       lane
=================================  ==============  ==========  =======================================================
`Categorical`, `Bernoulli` heads:  ``y * W + x``   ``c // 4``  ``c % 4``
colour channel c of pixel (y, x)
`LogisticMixture` head:            ``y * W + x``   0           0: mixture index; 1, 2, 3: logistic draws of channels
pixel (y, x)                                                   0, 1, 2 (one channel: lane 1)
normals: element e of draw s of    ``e // 4``      s           Box-Muller on the lane pairs (0, 1) and (2, 3); a latent
a sample                                                       is draw 0
dropout: feature f of F of pixel   ``y * W + x``   ``q % B``   ``2 * (q // B) + f % 4 // 2``; of its halves of 16 bits
(y, x), quad ``q = f // 4``,                                   the low one where f is even
``B = 8 * ceil(F / 64)``
=================================  ==============  ==========  =======================================================
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen import backends
from fastgen.ops.conv_block import is_transformed, unwrapped

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def uint32(seed: int, block: int | Tensor, position: int | Tensor, sample: int | Tensor) -> Tensor:
    """The four lanes of each draw: int64 [..., 4] with values in 0..2^32-1.

    Args:
        seed: 0..2^64-1.
        block: which draw of the position; 0..2^32-1.
        position: which pixel or element block of the sample; 0..2^32-1.
        sample: index of the sample in the sequence of the seed; 0..2^63-1.

    The last three are integers or integer tensors that broadcast against each other; their common shape is ``[...]``.

    Raises:
        TypeError: an argument is not of an integer type.
        ValueError: an argument is out of its range, or the shapes do not broadcast.
    """
    counter = _counter(seed, block, position, sample)
    if torch.compiler.is_compiling() or is_transformed():
        return philox_reference(seed, *counter)
    return backends.select("philox", seed, *counter)(seed, *counter)


def uniform(seed: int, block: int | Tensor, position: int | Tensor, sample: int | Tensor) -> Tensor:
    """The four lanes of each draw as float32 [..., 4] in the open interval (0, 1), see `uint32`.

    The upper 24 bits with the lowest of them set, times 2^-24: odd multiples of 2^-24, exact on every device.
    """
    return ((uint32(seed, block, position, sample) >> 8) | 1).float() * 2.0**-24


def check_seed(seed: int) -> None:
    """
    Raises:
        TypeError: the seed is not an integer.
        ValueError: it is not in 0..2^64-1.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in 0..2^64-1, got {seed}")


def philox_reference(seed: int, block: Tensor, position: Tensor, sample: Tensor) -> Tensor:
    """The definition: int64 tensors of one shape [...] -> int64 [..., 4]."""
    c0, c1, c2, c3 = block, position, sample & _WORD, sample >> 32 & _WORD
    k0, k1 = seed & _WORD, seed >> 32
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # modulo 2^64: the words are those of the unsigned product
        c0, c1 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD
        c2, c3 = (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _philox_cpu(seed: int, block: Tensor, position: Tensor, sample: Tensor) -> Tensor:
    block, position, sample = block.contiguous(), position.contiguous(), sample.contiguous()
    out = block.new_empty((*block.shape, 4))
    backends.native_cpu().philox_uint32(
        seed,
        block.data_ptr(),
        position.data_ptr(),
        sample.data_ptr(),
        block.numel(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _counter(seed: int, block: int | Tensor, position: int | Tensor, sample: int | Tensor) -> list[Tensor]:
    """The checked arguments as int64 tensors of one shape, on the device of the first tensor."""
    check_seed(seed)
    limits = {"block": (block, 2**32), "position": (position, 2**32), "sample": (sample, 2**63)}
    devices = [value.device for value in (block, position, sample) if isinstance(value, Tensor)]
    counter = [_words(name, value, limit, devices[0] if devices else None) for name, (value, limit) in limits.items()]
    try:
        return list(torch.broadcast_tensors(*counter))
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(words.shape)}" for name, words in zip(limits, counter, strict=True))
        raise ValueError(f"the shapes must broadcast against each other, got {shapes}") from None


def _words(name: str, value: int | Tensor, limit: int, device: torch.device | None) -> Tensor:
    kind = value.dtype if isinstance(value, Tensor) else type(value)
    if kind not in (int, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int or an integer tensor, got {kind}")
    if isinstance(value, int) and not 0 <= value < limit:
        raise ValueError(f"{name} must be in 0..{limit - 1}, got {value}")
    words = torch.as_tensor(value, dtype=torch.int64, device=device)
    if not torch.compiler.is_compiling() and words.numel():
        low, high = int(unwrapped(words).min()), int(unwrapped(words).max())
        if low < 0 or high >= limit:
            raise ValueError(f"{name} must be in 0..{limit - 1}, got values in {low}..{high}")
    return words


backends.register("philox", "reference", philox_reference)
backends.register("philox", "cpu", _philox_cpu)
backends.register("philox", "triton", backends.triton_kernel("philox", "uint32"))
