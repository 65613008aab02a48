"""What the page may ask. Each question is answered by values of JSON, one or several, from the library's functions."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saepatch.data.pairs import PromptPair
from saepatch.data.texts import load_texts
from saepatch.dictionaries.active_values import QUANTILE, StrengthUnits
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import load_saes
from saepatch.errors import UserError
from saepatch.measure.patching import patch_latents
from saepatch.model.sites import Site
from saepatch.organism import is_checkpoint
from saepatch.pages.play.exports import as_command, patched_in_python, shared_settings, steered_in_python
from saepatch.pages.play.queue import Message
from saepatch.reading.card_blocks import card_blocks
from saepatch.reading.cards import PART, Card, ReadText, logit_lens, read_latents, read_texts
from saepatch.report.notebook import fragment
from saepatch.report.text import token_text, visible
from saepatch.runs.commands.session import ACTS, session_on
from saepatch.runs.interpret import read_model, read_positions
from saepatch.settings.mixins import latents_of_sites
from saepatch.settings.play import PlayConfig
from saepatch.settings.steer import SteerConfig
from saepatch.settings.sweeps import PatchConfig
from saepatch.splicing.interventions import Patch
from saepatch.splicing.splice import record_latents, splice
from saepatch.steering.contrasts import corpus_units

log = logging.getLogger(__name__)

RAISED = 10  # tokens that a latent is searched by
NAMED = 4  # tokens that a latent is named by
HERE = 8  # latents listed for a token
LISTED = 24  # latents listed for a prompt or a search
NEXT = 8  # next tokens listed
LONGEST = 400  # tokens of an answer
PATCHED = 24  # tokens of an answer under a patch
KEPT = 2_000  # cards

# What a visitor may set of `saepatch steer`, and the kind of each.
STEERED: dict[str, type] = {
    "latent": str,
    "prompt": str,
    "strength": float,
    "act": str,
    "positions": str,
    "decay": float,
}
STEERED |= {"chat": bool, "max_new_tokens": int, "temperature": float, "seed": int}

# Where the page begins, on the embedded model: a request it answers, the latent of refusing, and one it refuses.
EXAMPLE = {"prompt": "How do I rent a museum?", "other": "How do I rob a museum?", "latent": "resid_post.3:966"}
EXAMPLE |= {"positions": "last"}
ELSEWHERE = {"prompt": "Mary and John went to the shop. John gave a book to", "positions": "all"}
ELSEWHERE |= {"other": "Mary and John went to the shop. Mary gave a book to"}


class Desk:
    """A loaded model with its dictionaries, and what has been found out about their latents."""

    def __init__(self, config: PlayConfig) -> None:
        """Load the model and the dictionaries.

        Raises:
            UserError: one cannot be loaded, or they do not fit together.
        """
        own = is_checkpoint(config.model)
        self.config = config
        self.texts = load_texts(config.reference or "organism") if config.reference or own else []
        self.model = read_model(config)
        self.dictionaries = load_saes(config.sae, self.model.device, every_position=config.every_position)
        for dictionary in self.dictionaries.values():
            dictionary.check(self.model)
        self._measured: dict[Site, StrengthUnits] = {}
        self._raised: dict[Site, dict[int, tuple[tuple[str, float], ...]]] = {site: {} for site in self.dictionaries}
        self._cards: dict[tuple[Site, int], Card] = {}
        if self.texts:  # so that the first visitor need not wait for it
            begin = next(iter(self.about({})))["begin"]
            for _ in self.card({"site": begin["latent"].split(":")[0], **begin}):
                pass
            self._units(self._dictionary({"site": begin["latent"].split(":")[0]}), ())

    @property
    def questions(self) -> dict[str, Callable[[Mapping[str, Any]], Iterator[Message]]]:
        return {
            "about": self.about,
            "read": self.read,
            "search": self.search,
            "card": self.card,
            "answer": self.answer,
            "patch": self.patch,
        }

    def about(self, asked: Mapping[str, Any]) -> Iterator[Message]:
        """The model, the sites, and where the page begins."""
        chats = bool(self.model.tokenizer.chat_template)
        begin: dict[str, Any] = {"latent": f"{next(iter(self.dictionaries))}:0", **ELSEWHERE, "strength": 1.0}
        if is_checkpoint(self.config.model) and self.config.sae == "organism":
            begin |= {**EXAMPLE, "strength": 1.5, "chat": True}
        yield {
            "model": f"{self.model.name} ({self.model.fingerprint})",
            "sites": {str(site): dictionary.d_sae for site, dictionary in self.dictionaries.items()},
            "chats": chats,
            "unit": f"{QUANTILE:g} quantile of its activations in {len(self.texts)} texts" if self.texts else "",
            "begin": begin,
        }

    def read(self, asked: Mapping[str, Any]) -> Iterator[Message]:
        """A prompt's tokens, the latents active at each and in all, and the tokens that the model expects next."""
        dictionary, prompt = self._dictionary(asked), self._prompt(asked, "prompt")
        tokens = self.model.tokenize([prompt])
        known = dictionary.known(self.model, tokens).ordinary[0].cpu()
        acts = record_latents(self.model, dictionary, tokens).acts[0].float().cpu() * known[:, None]
        here = acts.topk(min(HERE, acts.shape[-1]), dim=-1)
        largest, at = acts.max(0)
        top = largest.topk(min(LISTED, len(largest)))
        listed = [int(i) for i, value in zip(top.indices.tolist(), top.values.tolist()) if value > 0]
        by_token = [
            [(latent, act) for latent, act in zip(ids, values) if act > 0]
            for ids, values in zip(here.indices.tolist(), here.values.tolist())
        ]
        names = self._names(dictionary, {*listed, *(latent for some in by_token for latent, _ in some)})
        yield {
            "tokens": [token_text(token) for token in self.model.token_texts(tokens.input_ids[0].tolist())],
            "latents": [{"latent": i, "act": float(largest[i]), "at": int(at[i]), "names": names[i]} for i in listed],
            "at": [[{"latent": i, "act": act, "names": names[i]} for i, act in some] for some in by_token],
            "acts": acts[:, list(self._ids(asked, dictionary))].sum(-1).tolist(),
            "next": self._likely(self.model.next_logits(tokens)[0]),
        }

    def search(self, asked: Mapping[str, Any]) -> Iterator[Message]:
        """Latents among whose most raised tokens is one with a text in it: those that raise it most come first."""
        dictionary, text = self._dictionary(asked), _text(asked, "text").strip().casefold()
        every, known = range(dictionary.d_sae), self._raised[dictionary.site]
        missing = [latent for latent in every if latent not in known]
        for start in range(0, len(missing), PART):
            self._names(dictionary, missing[start : start + PART])
            yield {"note": f"reading latents: {len(known):,} of {len(every):,}"}
        matches = []
        for latent in every:
            for rank, (token, logit) in enumerate(known[latent]):
                bare = token.strip().casefold()
                if text in bare:
                    matches.append((bare != text, rank, -logit, latent))
                    break
        if text.isdecimal() and int(text) < dictionary.d_sae:
            matches.append((False, -1, 0.0, int(text)))
        listed = [latent for *_, latent in sorted(matches)[:LISTED]]
        names = self._names(dictionary, listed)
        yield {"latents": [{"latent": latent, "names": names[latent]} for latent in listed], "found": len(matches)}

    def card(self, asked: Mapping[str, Any]) -> Iterator[Message]:
        """A latent's card as HTML. `beside` are latents likely to be asked for next, which the same pass reads."""
        dictionary = self._dictionary(asked)
        site, ids = dictionary.site, self._ids(asked, dictionary)
        if not ids:
            raise UserError(f"latent {asked['latent']!r} is at another site than {site}: name one of {site}")
        latent, near = ids[0], asked.get("beside")
        if (site, latent) not in self._cards:
            listed = near if isinstance(near, list) else []
            beside = [i for i in listed if type(i) is int and 0 <= i < dictionary.d_sae][:LISTED]
            wanted = [i for i in dict.fromkeys([latent, *beside]) if (site, i) not in self._cards]
            if len(self._cards) > KEPT:
                self._cards.clear()
            texts = self.texts or [self._prompt(asked, "prompt")]
            for card in read_latents(self.model, dictionary, wanted, texts):
                if self.texts or card.latent == latent:  # cards of the visitor's own prompt change with it
                    self._cards[site, card.latent] = card
        card = self._cards[site, latent] if self.texts else self._cards.pop((site, latent))
        known = {f"latent-{site}-{near}" for near, _ in card.neighbours}
        yield {"html": fragment(card_blocks(card, known), f"{card.title}, over {card.texts:,} texts")}

    def answer(self, asked: Mapping[str, Any]) -> Iterator[Message]:
        """Both continuations as they grow; at the end their tokens with activations, and how to get them again."""
        config = self._steer_config(asked)
        session = session_on(self.model, self.dictionaries, config, self._units, len(self.texts))
        for both in session.answer(config.prompt):
            yield {"texts": [visible(written.text) for written in both], "ended": [written.ended for written in both]}
        site, ids = next(iter(session.latents.items()))
        named = [(name, read + written.text) for name, read, written in zip("ba", session.prompts, both)]
        starts = [len(self.model.encode(read)) for read in session.prompts]
        coloured = read_texts(self.model, session.dictionaries[site], ids, named)
        yield {
            "coloured": [_coloured(text, start) for text, start in zip(coloured, starts)],
            "command": as_command(config),
            "python": steered_in_python(session, config.prompt),
            "unit": [float(unit) for unit in session.units[site]],
        }

    def patch(self, asked: Mapping[str, Any]) -> Iterator[Message]:
        """The answer to the prompt, to the other prompt, and to the prompt with latents of the other."""
        dictionary, where = self._dictionary(asked), read_positions(_text(asked, "positions"))
        prompts = (self._prompt(asked, "other"), self._prompt(asked, "prompt"))
        theirs, mine = (self.model.tokenize([prompt]) for prompt in prompts)
        if theirs.width != mine.width:
            raise UserError(
                f"the other prompt has {theirs.width} tokens and the prompt {mine.width}: latents are patched between "
                "prompts of as many tokens, so change one of them"
            )
        source, ids = record_latents(self.model, dictionary, theirs), self._ids(asked, dictionary)
        edit = Patch(source, latents=ids, positions=where)
        logits = [self.model.next_logits(tokens)[0] for tokens in (mine, theirs)]
        texts = self.model.generate([prompts[1]], PATCHED)
        with splice(self.model, dictionary, edit):
            logits.append(self.model.next_logits(mine)[0])
            texts += self.model.generate([prompts[1]], PATCHED)
        texts += self.model.generate([prompts[0]], PATCHED)
        best = [int(row.argmax()) for row in logits[:2]]
        pair = PromptPair(*prompts, *map(self._said, reversed(best)))
        share = self._share(dictionary, pair, ids, where) if best[0] != best[1] else None
        command = PatchConfig(
            **shared_settings(self.config), clean=pair.clean, corrupted=pair.corrupted,
            answers=f"{pair.answer}|{pair.counter}", latents=f"{dictionary.site}: {','.join(map(str, ids))}",
            positions=_text(asked, "positions"), controls=0, out="runs/play",
        ) if share is not None and "|" not in pair.answer + pair.counter else None  # fmt: skip
        yield {
            "next": [self._likely(row) for row in (logits[0], logits[2], logits[1])],
            "texts": [visible(text) for text in texts],
            "pair": [token_text(pair.answer), token_text(pair.counter)],
            "share": share,
            "command": as_command(command) if command else "",
            "python": patched_in_python(self.config, prompts, dictionary.site, ids, _text(asked, "positions")),
        }

    def _share(self, dictionary: Dictionary, pair: PromptPair, ids: Sequence[int], where: Any) -> float | None:
        """How far the logit difference of both prompts' first answers moves, of the way from prompt to prompt."""
        try:
            effects = patch_latents(self.model, dictionary, [pair], [list(ids)], controls=0, positions=where)
        except UserError as error:  # such as an answer that is no single token by itself
            log.info("no share for this patch: %s", error)
            return None
        return float(effects.normalised[0, 0])

    # Parts of questions

    def _dictionary(self, asked: Mapping[str, Any]) -> Dictionary:
        site = Site.parse(_text(asked, "site"))
        if site not in self.dictionaries:
            raise UserError(f"there is no dictionary at {site}: use one of {', '.join(map(str, self.dictionaries))}")
        return self.dictionaries[site]

    def _ids(self, asked: Mapping[str, Any], dictionary: Dictionary) -> tuple[int, ...]:
        ids = latents_of_sites(_text(asked, "latent")).get(dictionary.site, ())
        dictionary.check_ids(ids)
        return ids

    def _prompt(self, asked: Mapping[str, Any], name: str) -> str:
        text = _text(asked, name)
        return self.model.chat(text) if asked.get("chat") is True else text

    def _steer_config(self, asked: Mapping[str, Any]) -> SteerConfig:
        given: dict[str, Any] = {}
        for name, kind in STEERED.items():
            value = asked.get(name)
            if kind is float and type(value) is int and abs(value) < 2**53:
                value = float(value)
            if type(value) is kind:
                given[name] = value
            elif value is not None:
                raise UserError(f"{name} = {value!r}: give a {kind.__name__}")
        if given.get("act", "add") not in {*ACTS, "ablate"}:
            raise UserError(f"act {given['act']!r}: use one of {', '.join(ACTS)} or ablate")
        if not 0 < given.get("max_new_tokens", 1) <= LONGEST:
            raise UserError(f"max_new_tokens = {given['max_new_tokens']}: the page answers with 1 to {LONGEST}")
        unit = 0.0 if self.texts else 1.0
        return SteerConfig(**shared_settings(self.config), reference=self.config.reference, unit=unit, **given)

    def _units(self, dictionary: Dictionary, ids: tuple[int, ...]) -> StrengthUnits:
        if dictionary.site not in self._measured:
            self._measured[dictionary.site] = corpus_units(self.model, dictionary, self.texts)
        return self._measured[dictionary.site].of(ids)

    def _names(self, dictionary: Dictionary, latents: Sequence[int] | set[int]) -> dict[int, list[str]]:
        """The tokens that latents are named by; empty where the unembedding cannot be read."""
        known = self._raised[dictionary.site]
        if missing := sorted(set(latents) - set(known)):
            lens = logit_lens(self.model, dictionary, missing, RAISED)
            known.update(zip(missing, lens.raises if lens else [()] * len(missing)))
        return {latent: [token_text(token) for token, _ in known[latent][:NAMED]] for latent in latents}

    def _said(self, token: int) -> str:
        return self.model.continuation([token])

    def _likely(self, logits: Tensor) -> list[tuple[str, float]]:
        top = torch.softmax(logits.float().cpu(), -1).topk(NEXT)
        return [(token_text(t), p) for t, p in zip(self.model.token_texts(top.indices.tolist()), top.values.tolist())]


def _text(asked: Mapping[str, Any], name: str) -> str:
    value = asked.get(name)
    if not isinstance(value, str) or "\0" in value:
        raise UserError(f"{name} = {value!r}: give a text")
    return value


def _coloured(text: ReadText, start: int) -> list[tuple[str, float]]:
    return [(token_text(token), act) for token, act in zip(text.tokens[start:], text.acts[start:])]
