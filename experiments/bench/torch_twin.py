"""A plain PyTorch model of the size of a config's dense model, and its training step: what a user would write instead.

Pre-norm blocks of grouped attention (PyTorch's fused one) and a feed-forward layer, cross-entropy, clipping, fused AdamW. It has no
rotary positions, no packing, and gathers no statistics: what it leaves out is to its advantage.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moejax.core.errors import ConfigError


def step(config: Mapping[str, Any], batch: Mapping[str, np.ndarray]) -> Callable[[], float]:
    """One training step of the twin, called again and again; gives its loss.

    Args:
      config: a plain config whose model is `decoder_lm` or `vit`; of its blocks, the first of the pattern counts.
      batch: of the config's data.

    Raises:
      ConfigError: PyTorch is not there.
    """
    try:
        import torch
    except ImportError as error:
        raise ConfigError(f"--against=torch needs PyTorch: pip install torch ({error})") from None
    from torch import nn
    from torch.nn import functional

    spec = config["model"]
    block = spec["blocks"][spec["pattern"][0]]
    width, causal = spec["d_model"], spec["kind"] == "decoder_lm"
    heads = block["mixer"]["num_heads"]
    kv_heads = block["mixer"].get("num_kv_heads") or heads
    hidden, gated = block["ffn"]["hidden"], block["ffn"]["kind"] == "glu"
    norm = nn.RMSNorm if block["norm"]["kind"] == "rms_norm" else nn.LayerNorm

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([norm(width), norm(width)])
            self.qkv = nn.Linear(width, width + 2 * kv_heads * (width // heads), bias=False)
            self.out = nn.Linear(width, width, bias=False)
            self.up = nn.Linear(width, (2 if gated else 1) * hidden, bias=False)
            self.down = nn.Linear(hidden, width, bias=False)

        def forward(self, x: Any) -> Any:
            b, s, _ = x.shape
            each = width // heads
            sizes = [width, kv_heads * each, kv_heads * each]
            q, k, v = (y.view(b, s, -1, each).transpose(1, 2) for y in self.qkv(self.norms[0](x)).split(sizes, -1))
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=kv_heads != heads)
            x = x + self.out(y.transpose(1, 2).reshape(b, s, width))
            y = self.up(self.norms[1](x))
            if gated:
                gate, y = y.chunk(2, -1)
                y = functional.silu(gate) * y
            else:
                y = functional.gelu(y)
            return x + self.down(y)

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(spec["vocab_size"], width)
            self.blocks = nn.Sequential(*(Block() for _ in range(spec["num_layers"])))
            self.norm = norm(width)

        def forward(self, tokens: Any) -> Any:
            return functional.linear(self.norm(self.blocks(self.table(tokens))), self.table.weight)

    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            patches = (spec["image_size"] // spec["patch_size"]) ** 2
            self.patch = nn.Conv2d(spec["channels"], width, spec["patch_size"], spec["patch_size"])
            self.positions = nn.Parameter(0.02 * torch.randn(1, patches, width))
            self.blocks = nn.Sequential(*(Block() for _ in range(spec["num_layers"])))
            self.norm = norm(width)
            self.head = nn.Linear(width, spec["num_classes"])

        def forward(self, images: Any) -> Any:
            x = self.patch(images).flatten(2).transpose(1, 2) + self.positions
            return self.head(self.norm(self.blocks(x)).mean(1))

    given = {name: torch.from_numpy(np.array(value)) for name, value in batch.items()}
    if causal:
        model, inputs, targets = Text(), given["tokens"].long(), given["targets"].long().flatten()
    else:
        model, inputs, targets = Images(), given["image"].permute(0, 3, 1, 2), given["label"].long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def call() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = model(inputs)
        loss = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return call
