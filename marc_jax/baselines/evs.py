"""EVS (arXiv 2510.14624, NVIDIA): the tokens that changed most since the patch before, wherever they are.

    score_tp = 1 - cos(x_tp, x_(t-1)p), larger than any in the first patch; kept = the largest of the whole video
Rule and tie-breaking (the earlier token) of the released form in vLLM (vllm/multimodal/evs.py), which never goes below
one whole patch; here the budget may cut the first patch short.
"""

from marc_jax.baselines.kept import KeptTokens, budget, change, gather, real_tokens, smallest


def compress(vis_btpd, mask_bt, event_bt, keep, *, target_b=None, tokens_b=None) -> KeptTokens:
    """Arguments and result as in `kept`."""
    del event_bt
    b, t, p, _ = vis_btpd.shape
    count_b = budget(mask_bt, p if tokens_b is None else tokens_b, keep, target_b)
    still_bm = -change(vis_btpd, mask_bt).reshape(b, t * p)
    chosen_bm = smallest(still_bm, real_tokens(mask_bt, p, tokens_b).reshape(b, t * p), count_b)
    return gather(vis_btpd, chosen_bm.reshape(b, t, p), keep)
