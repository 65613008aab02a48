"""Makes the attribution graph of a prompt, and splits its edges by attention heads: gradients under freezing."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from saepatch.circuits.edges.attribution_graph import AttributionGraph, Vertex
from saepatch.circuits.edges.backward import Counts, frozen_attention, frozen_norms
from saepatch.circuits.edges.jacobians import encoder_slopes
from saepatch.circuits.nodes import NodeSite, node_sites, upstream
from saepatch.circuits.residual.unembedding import read_unembedding, tolerance_of
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.components import LatentUnits, Stream
from saepatch.engine.passes.kept_run import KeptRun
from saepatch.engine.spans import SpanGraph
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel, refuse_training
from saepatch.model.replaced import attention_replaced
from saepatch.model.sites import Site

MOST = 20_000  # nodes: the matrix of edges is dense
AT_ONCE = 64  # readers whose gradients are taken together
EMBEDDINGS = Site(0, "resid_pre")


def attribution_graph(
    model: LanguageModel, dictionaries: Sequence[Dictionary], prompt: str, mass: float = 0.95, most: int = 10
) -> AttributionGraph:
    """The attribution graph of one prompt.

    Sources are the token embeddings, every MLP's output, and of every dictionary its active latents, error terms and
    `b_dec`; a dictionary in the residual stream stands for all before it. At BOS and tokens that a dictionary was not
    trained on, the whole value is its error term. Readers are its active latents, and the logits of the fewest tokens
    that have `mass` of the probability after the prompt, at most `most`. A dictionary at mlp_out has sources alone.
    Gemma's post-norms keep their scale like every other norm.

    Raises:
        UserError: a dictionary normalises its input, or has latents that are not linear where they are active; the
            model's norms or attention cannot be frozen; there are too many nodes; or edges do not sum to a reader's
            value.
    """
    made = FrozenModel.of(model, dictionaries, prompt)
    with made.frozen():
        for node in made.nodes:
            made.read_latents(node)
        made.read_logits(mass, most)
    graph = made.graph()
    if not graph.gap <= tolerance_of(model.dtype):
        raise UserError(
            f"edges sum to the readers' values only to {graph.gap:.1e}: {model.name} has something between its MLPs "
            "that does not become linear when attention patterns and norms are frozen"
        )
    return graph


def head_loadings(
    model: LanguageModel, dictionaries: Sequence[Dictionary], prompt: str, up: Vertex, down: Vertex
) -> dict[tuple[int, int] | None, float]:
    """The parts of an edge by the last attention head (layer, head) that it passes on its way; None: by none.

    The parts sum to the edge's weight in `attribution_graph`.

    Raises:
        UserError: there is no such edge between a source and an active latent.
    """
    sites = list(model.layout.of_stream("z"))
    made = FrozenModel.of(model, dictionaries, prompt, sites)
    if up.site is None or down.kind != "latent" or not {up, down} <= set(made.vertices):
        raise UserError(f"no edge from {up} to {down}: give a source with a site and an active latent of the graph")
    site, target = up.site, down.site
    assert target is not None
    leaves = made.leaves(target)
    if site not in leaves:
        raise UserError(f"no edge from {up} to {down}: it starts after it, or before a stream that has nodes")
    heads = [z for z in sites if site.order < z.order < target.order]
    with made.frozen():
        graph = SpanGraph(made.base, leaves | {z: made.base.values[z] for z in heads}, target)
        at = [graph.leaves[site], *(graph.leaves[z] for z in heads)]
        taken = torch.autograd.grad(graph.whole, at, made.cotangent(down)[0], allow_unused=True, materialize_grads=True)
        parts: dict[tuple[int, int] | None, float] = {None: made.written(up, taken[0][None])[0]}
        for z, gradient in zip(heads, taken[1:], strict=True):
            own = torch.eye(model.n_heads, dtype=gradient.dtype, device=gradient.device)
            masked = gradient.unflatten(-1, (model.n_heads, -1)) * own[:, None, None, :, None]
            inner = SpanGraph(made.base, {s: x for s, x in leaves.items() if s.order < z.order}, z)
            (pulled,) = torch.autograd.grad(
                inner.whole, [inner.leaves[site]], masked.flatten(-2), is_grads_batched=True
            )
            parts |= {(z.layer, head): part for head, part in enumerate(made.written(up, pulled))}
    return parts


class FrozenModel:
    """A prompt's run, its sources, and gradients while nonlinearities are frozen."""

    @classmethod
    def of(
        cls, model: LanguageModel, dictionaries: Sequence[Dictionary], prompt: str, also: Sequence[Site] = ()
    ) -> "FrozenModel":
        refuse_training(model)
        taken = {dictionary.site for dictionary in dictionaries}
        mlps = [site for site in model.layout.all_sites if site.stream == "mlp_out"]
        _refuse_hidden_mlps(model, {site.layer for site in mlps})
        streams = [Stream(site) for site in (EMBEDDINGS, *mlps) if site not in taken]
        if any(site.same_tensor(EMBEDDINGS) for site in taken):
            streams = streams[1:]
        nodes = node_sites(model, [*streams, *dictionaries])
        return cls(model, nodes, KeptRun(model, model.tokenize([prompt]), [*(node.site for node in nodes), *also]))

    def __init__(self, model: LanguageModel, nodes: Sequence[NodeSite], base: KeptRun) -> None:
        self.model, self.nodes, self.base = model, nodes, base
        self.vertices: list[Vertex] = []
        self.vectors: dict[Site, tuple[list[int], list[int], list[Tensor]]] = {}  # vertex, position, what it writes
        self.rows: list[tuple[int, Tensor, float, float]] = []
        self._saes: dict[Site, Any] = {}
        in_blocks = {id(p) for block in model.layout.blocks for p in block.parameters()}
        self.biases = {
            name: parameter
            for name, parameter in model.hf.named_parameters()
            if name.rpartition(".")[2] == "bias" and id(parameter) in in_blocks
        }
        for node in nodes:
            self._sources(node)
        self._bias = {name: self._vertex(Vertex("bias", name=name)) for name in self.biases}

    def _vertex(self, vertex: Vertex) -> int:
        if len(self.vertices) == MOST:
            raise UserError(f"more than {MOST:,} nodes: give a shorter prompt, or fewer dictionaries")
        self.vertices.append(vertex)
        return len(self.vertices) - 1

    def _sources(self, node: NodeSite) -> None:
        x = self.base.values[node.site][0].float()
        own: tuple[list[int], list[int], list[Tensor]] = ([], [], [])
        first = node.components[0]

        def add(vertex: Vertex, position: int, vector: Tensor) -> None:
            for listed, item in zip(own, (self._vertex(vertex), position, vector), strict=True):
                listed.append(item)  # type: ignore[attr-defined]

        if isinstance(first, LatentUnits):
            dictionary = first.dictionary
            sae: Any = dictionary.sae
            self._saes[node.site] = sae
            acts, rows = dictionary.activations(x[None])[0][0], dictionary.rows.float()
            b_dec = sae.b_dec.detach().float()
            known = dictionary.known(self.model, self.base.tokens).ordinary[0]
            acts = acts * known[:, None]  # elsewhere the whole value is the error term
            for p, unit in acts.nonzero().tolist():
                add(Vertex("latent", node.site, unit, p), p, acts[p, unit] * rows[unit])
            error = x - acts.float() @ rows - b_dec * known[:, None]
            shared = self._vertex(Vertex("b_dec", node.site))
            for p in range(len(x)):
                add(Vertex("error", node.site, 0, p), p, error[p])
            for p in known.nonzero().flatten().tolist():
                for listed, item in zip(own, (shared, p, b_dec), strict=True):
                    listed.append(item)  # type: ignore[attr-defined]
        else:
            kind = "embedding" if node.site == EMBEDDINGS else "mlp_out"
            for p in range(len(x)):
                add(Vertex(kind, node.site, 0, p), p, x[p])
        self.vectors[node.site] = own

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Norms and attention patterns are constants, and biases have gradients."""
        counts: Counts = Counts()
        before = {name: parameter.requires_grad for name, parameter in self.biases.items()}
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(frozen_norms(self.model, counts))
            stack.enter_context(attention_replaced(self.model.hf, partial(frozen_attention, counts)))
            try:
                for parameter in self.biases.values():
                    parameter.requires_grad_(True)
                yield
            finally:
                for name, parameter in self.biases.items():
                    parameter.requires_grad_(before[name])

    def cotangent(self, *some: Vertex) -> Float[Tensor, "readers 1 pos width"]:
        """Gradients of latents' pre-activations at their site."""
        site = some[0].site
        assert site is not None
        x, sae = self.base.values[site], self._saes[site]
        out = x.new_zeros(len(some), 1, *x.shape[1:])
        for number, vertex in enumerate(some):
            assert vertex.position is not None
            out[number, 0, vertex.position] = sae.W_enc.detach()[:, vertex.unit].to(x.dtype)
        return out

    def written(self, vertex: Vertex, gradients: Float[Tensor, "some 1 pos width"]) -> list[float]:
        """What a source adds, by some gradients at its site."""
        number, (listed, position, vectors) = self.vertices.index(vertex), self.vectors[vertex.site]  # type: ignore[index]
        mine = [i for i, j in enumerate(listed) if j == number]
        parts = [(gradients[:, 0, position[i]].double() * vectors[i].double()).sum(-1) for i in mine]
        return torch.stack(parts).sum(0).tolist()

    def read_latents(self, node: NodeSite) -> None:
        """The edges into a dictionary's active latents: into their pre-activations."""
        first = node.components[0]
        if not isinstance(first, LatentUnits) or node.site.stream == "mlp_out" or not self.leaves(node.site):
            return
        dictionary, x = first.dictionary, self.base.values[node.site]
        sae = self._saes[node.site]
        if encoder_slopes(dictionary, x[0, :4]) is None or getattr(sae, "b_enc", None) is None:
            raise UserError(
                f"dictionary {dictionary.name} ({dictionary.architecture}): the pre-activation of its latents is not "
                "W_enc x + b_enc, so it has no edges under freezing: use a standard, TopK or JumpReLU dictionary"
            )
        columns = sae.W_enc.detach().T.float()
        graph = SpanGraph(self.base, self.leaves(node.site), node.site)
        readers = [i for i, v in enumerate(self.vertices) if v.kind == "latent" and v.site == node.site]
        constants = [(self._vertex(Vertex("bias", node.site, name="b_enc")), sae.b_enc.detach().float())]
        if dictionary.cfg.apply_b_dec_to_input:
            shift = -columns @ sae.b_dec.detach().float()
            constants.append((self._vertex(Vertex("bias", node.site, name="−b_dec W_enc")), shift))
        for some in np.array_split(readers, max(1, -(-len(readers) // AT_ONCE))):
            listed = [self.vertices[i] for i in some.tolist()]
            units = torch.tensor([vertex.unit for vertex in listed])
            rows = self.pulled(graph, self.cotangent(*listed))
            positions = [vertex.position for vertex in listed]
            value = (x[0, positions].float() * columns[units]).sum(-1)
            for vertex, constant in constants:
                rows[:, vertex] += constant[units].double()
                value = value + constant[units]
            self.rows += [(i, row, float(v), 0.0) for i, row, v in zip(some.tolist(), rows, value, strict=True)]

    def read_logits(self, mass: float, most: int) -> None:
        """The edges into the logits of the likeliest tokens, minus the mean logit."""
        unembedding, last = read_unembedding(self.model), Site(self.model.n_layers - 1, "resid_post")
        probability = self.base.logits[0].float().softmax(-1)
        likely = probability.sort(descending=True)
        count = min(int((likely.values.cumsum(0) < mass).sum()) + 1, most)
        targets = likely.indices[:count]
        x, graph = self.base.values.get(last), None
        if x is None:
            graph = SpanGraph(self.base, self.leaves(None), last)
            x = graph.whole.detach()
        sigma = unembedding.sigma(x[0, -1:])
        every = torch.arange(len(unembedding.weight), device=x.device)[None]
        mean = unembedding.directions(sigma, every)[0].mean(0)
        directions = unembedding.directions(sigma, targets[None])[0] - mean
        cotangents = x.new_zeros(count, 1, *x.shape[1:])
        cotangents[:, 0, -1] = directions.to(x.dtype)
        rows = self._rows({last: cotangents}, (), count) if graph is None else self.pulled(graph, cotangents)
        logits = unembedding.logits(x[0, -1:], every)[0]
        for name, constant in zip(("final norm", "unembedding"), unembedding.constants(every), strict=True):
            if bool(constant.any()):
                vertex = self._vertex(Vertex("bias", name=name))
                rows = nn.functional.pad(rows, (0, len(self.vertices) - rows.shape[1]))
                rows[:, vertex] = (constant[0, targets] - constant.mean()).double()
        for number, token in enumerate(targets.tolist()):
            (name,) = self.model.token_texts([token])
            vertex = self._vertex(Vertex("logit", None, token, x.shape[1] - 1, name))
            value = float(logits[token] - logits.mean())
            self.rows.append((vertex, rows[number], value, float(probability[token])))

    def leaves(self, down: Site | None) -> dict[Site, Tensor]:
        return {up.site: self.base.values[up.site] for up in upstream(self.nodes, down)}

    def pulled(
        self, graph: SpanGraph, cotangents: Float[Tensor, "readers *shape"], of: Float[Tensor, "*shape"] | None = None
    ) -> Float[Tensor, "readers vertices"]:
        """What every vertex adds to some readers of the graph's target, or of another value in the graph."""
        gradients = torch.autograd.grad(
            graph.whole if of is None else of,
            [*graph.leaves.values(), *self.biases.values()],
            cotangents,
            is_grads_batched=True,
            retain_graph=True,
            allow_unused=True,
        )
        of_sites = dict(zip(graph.leaves, gradients, strict=False))
        return self._rows(of_sites, gradients[len(of_sites) :], len(cotangents))

    def _rows(
        self, of_sites: Mapping[Site, Tensor | None], of_biases: Sequence[Tensor | None], count: int
    ) -> Float[Tensor, "readers vertices"]:
        """What every vertex adds to some readers, from gradients [readers, 1, pos, width] and of the model's biases."""
        rows = torch.zeros(count, len(self.vertices), dtype=torch.float64)
        for site, gradient in of_sites.items():
            vertex, position, vectors = self.vectors[site]
            if gradient is not None and vertex:
                stacked = torch.stack(vectors).double()
                parts = (gradient[:, 0, position].double() * stacked).sum(-1)
                rows.index_add_(1, torch.tensor(vertex), parts.cpu())
        for (name, parameter), gradient in zip(self.biases.items(), of_biases, strict=False):
            if gradient is not None:
                rows[:, self._bias[name]] = (gradient.double() * parameter.detach().double()).flatten(1).sum(1).cpu()
        return rows

    def graph(self) -> AttributionGraph:
        width = len(self.vertices)
        weight = np.stack([nn.functional.pad(row, (0, width - len(row))).numpy() for _, row, _, _ in self.rows])
        reader, value, probability = (np.array([row[i] for row in self.rows]) for i in (0, 2, 3))
        return AttributionGraph(tuple(self.vertices), reader, weight, value, probability)


def _refuse_hidden_mlps(model: LanguageModel, layers: Collection[int]) -> None:
    """Raises UserError for a block outside `layers` with weights beside its attention's: they would not be frozen."""
    for layer, block in enumerate(model.layout.blocks):
        attention, offered = Site(layer, "attn_out"), model.layout.all_sites
        inside = {id(p) for p in model.layout.module(attention).parameters()} if attention in offered else set()
        if layer not in layers and any(p.dim() > 1 and id(p) not in inside for p in block.parameters()):
            raise UserError(
                f"layer {layer} of {model.name} offers no mlp_out, so its MLP cannot be frozen: an attribution graph "
                "needs it in every layer that has an MLP"
            )
