"""The update rows of tools.bench.train with transformers (PyTorch): a JSON line per row, case -> ms and bytes so far.

    python -m tools.bench.train_transformers --size=3b

As its users run it: every completion carries its own copy of the prompt, gradient checkpointing, sdpa attention, fused
AdamW behind a clip of the gradient norm, bfloat16 weights and moments, logits of the completions only. The vision tower
is frozen and the visual tokens are given, as in ours.
"""

import argparse
import statistics
import sys
import time

import torch

from marc_jax.models import qwen25_vl
from tools.bench import reference
from tools.bench import train as bench
from tools.bench.model_transformers import load


def log_probs(logits, targets):
    """Row by row, so that no float32 copy of all logits exists (what TRL does)."""
    rows = []
    for row, wanted in zip(logits, targets, strict=True):
        chosen = torch.log_softmax(row, dim=-1).gather(-1, wanted[:, None])[:, 0]
        rows.append(chosen)
    return torch.stack(rows)


def measure(net, optimizer, case, repeats: int, device: str) -> dict:
    """Median milliseconds of one update, and the allocator's peak."""
    rows, p, r = bench.GROUP * case.view.batch, case.prompt_tokens, case.new
    decoder, size = net.model.language_model, net.config.text_config.hidden_size
    prompt = torch.randn(rows, p, size, device=device, dtype=torch.bfloat16)
    tokens = torch.randint(7, 300, (rows, r), device=device)
    gain = torch.randn(rows, 1, device=device)
    mask = torch.ones(rows, p + r, dtype=torch.long, device=device)
    trained = [w for w in net.parameters() if w.requires_grad]

    def once():
        start = time.perf_counter()
        inputs = torch.cat([prompt, decoder.embed_tokens(tokens)], 1)
        hidden = decoder(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state
        logp = log_probs(net.lm_head(hidden[:, p - 1 : -1]), tokens)
        loss = -(torch.exp(logp - logp.detach()) * gain).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    once()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    once()
    ms = statistics.median(once() for _ in range(repeats))
    return {"ms": ms, "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else 0}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="3b")
    parser.add_argument("--rows", default="")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg = qwen25_vl.tiny() if args.size == "tiny" else qwen25_vl.qwen25_vl(args.size)
    net = load(cfg, device)
    net.model.visual.requires_grad_(False)
    net.train()
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [w for w in net.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.01, fused=True)
    chosen = [c for c in bench.CASES if c.peer == c.key and (not args.rows or c.key in args.rows.split(","))]
    reference.report(
        (c.key, c.title, lambda c=c: [measure(net, optimizer, c, args.repeats, device)]) for c in chosen
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
