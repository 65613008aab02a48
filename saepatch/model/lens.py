"""Mapping directions at a site to the residual stream, and the final norm before the unembedding."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site

INSIDE = {
    "z": "attn_out",
    "neurons": "mlp_out",
}  # streams outside the residual stream, and the stream their projection leads to


@torch.no_grad()
def stream_directions(model: LanguageModel, site: Site, rows: Float[Tensor, "n width"]) -> Float[Tensor, "n d_model"]:
    """What directions at a site add to the residual stream.

    At resid_pre, resid_post, attn_out and mlp_out, a direction adds itself; at mlp, its part that is written. Head
    outputs (z) are multiplied by the output projection W_O, MLP neurons by the MLP's output projection, and both by the
    post-norm where a family has one: it rescales, so that only the direction is meaningful there.

    Raises:
        UserError: the model has no such site.
    """
    if site.stream not in INSIDE:
        return rows[:, : model.d_model]  # of a transcoder, what it writes
    project = model.layout.module(site)
    weight = next(project.parameters())
    x = torch.cat([rows, torch.zeros_like(rows[:1])]).to(model.device, weight.dtype)[None]
    out = project(x)[0].float()
    out = out[:-1] - out[-1]  # without a bias
    paths = model.layout.paths[site.layer]
    path = paths.get(INSIDE[site.stream])
    if path is None or paths[site.stream].startswith(f"{path}."):  # the projection is the last step of attention or MLP
        return out
    norm = model.layout.module(Site(site.layer, INSIDE[site.stream]))
    sized = nn.functional.normalize(out, dim=-1) * model.d_model**0.5
    x = torch.cat([sized, torch.zeros_like(sized[:1])]).to(model.device, weight.dtype)[None]
    normed = norm(x)[0].float()
    return normed[:-1] - normed[-1]


@torch.no_grad()
def final_norm(model: LanguageModel) -> nn.Module | None:
    """The norm between the last block and the unembedding, or None.

    It is the norm next to the blocks whose output, unembedded, gives the model's logits up to a scale and a soft cap.
    """
    blocks = model.layout.blocks
    home = [
        m for m in model.hf.modules() if any(isinstance(c, nn.ModuleList) and c[0] is blocks[0] for c in m.children())
    ]
    norms = [child for parent in home for child in parent.children() if "norm" in type(child).__name__.lower()]
    if not norms:
        return None
    tokens, last = model.probe(), Site(model.n_layers - 1, "resid_post")
    x = model.capture(tokens, [last])[last]
    truth = model.call(tokens).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap:
        truth = cap * torch.atanh((truth / cap).clamp(-1 + 1e-6, 1 - 1e-6))
    head: Any = model.hf.get_output_embeddings()  # type: ignore[operator]
    for norm in norms:
        own = head(norm(x).to(head.weight)).float().to(truth.device)
        if float(nn.functional.cosine_similarity(own, truth, dim=-1).min()) > 0.999:
            return norm
    return None
