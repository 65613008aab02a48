"""Latents by site as one value, with one notation: `resid_post.3: 281; 3,17 | resid_post.4: 5`."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from saepatch.errors import UserError
from saepatch.model.sites import Site

if TYPE_CHECKING:
    from saepatch.dictionaries.dictionary import Dictionary

Group = tuple[int, ...]
Groups = tuple[Group, ...] | None  # None: all latents of the dictionary
Ids = tuple[int, ...] | None

IDS = re.compile(r"\s*\d{1,18}\s*([,;]\s*\d{1,18}\s*)*")


@dataclass(frozen=True, eq=False)
class LatentSet(Mapping[Site, Ids]):
    """Latents of one or several sites: a mapping from each site to its latents in order, None for all of them.

    Latents may form groups that are edited together: `groups` returns the groups, the mapping flattens them. Latents
    given without a site are `unnamed`, and belong to the only dictionary, until `at` assigns the site.

    Attributes:
        named: Groups of latents by site.
        unnamed: Groups of latents without a site; empty where sites are named.
    """

    named: tuple[tuple[Site, Groups], ...] = ()
    unnamed: Groups = ()

    @classmethod
    def parse(cls, text: str) -> "LatentSet":
        """Parse `417; 3,17` (one site), `resid_post.3: 281; 3,17 | resid_post.4: 5`, or `all` in place of numbers.

        Semicolons separate groups, commas the latents of a group, bars sites. Repeated latents and groups count once.

        Raises:
            UserError: the text is malformed, or a site is unknown.
        """
        by_site: dict[Site | None, Groups] = {}
        for part in text.split("|") if text.strip() else ():
            name, colon, ids = part.rpartition(":")
            site = Site.parse(name.strip()) if colon else None
            groups = _groups(ids, text)
            known = by_site.get(site, ())
            by_site[site] = None if groups is None or known is None else tuple(dict.fromkeys([*known, *groups]))
        unnamed = by_site.pop(None, ())
        if unnamed != () and by_site:
            raise UserError(_malformed(text))
        return cls(tuple((site, groups) for site, groups in by_site.items() if site is not None), unnamed)

    @classmethod
    def of(cls, latents: Mapping[Site, Sequence[int] | None]) -> "LatentSet":
        """A set from latents by site, one group per site; None: all latents of the site."""
        return cls(
            tuple(
                (site, None if ids is None else (tuple(map(int, ids)),) if len(ids) else ())
                for site, ids in latents.items()
            )
        )

    @classmethod
    def from_facts(cls, facts: Mapping[str, Sequence[int] | None]) -> "LatentSet":
        """The inverse of `facts`, for values from run.json and summary.json."""
        return cls.of({Site.parse(site): ids for site, ids in facts.items()})

    @classmethod
    def all_of(cls, sites: Iterable[Site]) -> "LatentSet":
        """All latents of these sites."""
        return cls(tuple((site, None) for site in sites))

    def __getitem__(self, site: Site) -> Ids:
        groups = dict(self.named)[site]
        return None if groups is None else _flat(groups)

    def __iter__(self) -> Iterator[Site]:
        return (site for site, _ in self.named)

    def __len__(self) -> int:
        return len(self.named)

    def __bool__(self) -> bool:
        return bool(self.named) or self.unnamed != ()

    def __eq__(self, other: object) -> bool:
        """Sets are compared including their groups; a plain mapping, by the latents of each site."""
        if isinstance(other, LatentSet):
            return (dict(self.named), self.unnamed) == (dict(other.named), other.unnamed)
        return self.unnamed == () and isinstance(other, Mapping) and dict(self) == dict(other)

    def __hash__(self) -> int:
        return hash((frozenset(self.named), self.unnamed))

    def __str__(self) -> str:
        """The text that `parse` accepts."""
        named = " | ".join(f"{site}: {_text(groups)}" for site, groups in self.named if groups != ())
        return named or _text(self.unnamed)

    def groups(self, site: Site) -> Groups:
        """The groups of a site's latents; None: all latents of the site.

        Raises:
            KeyError: the site is not in the set.
        """
        return dict(self.named)[site]

    def spelt(self) -> dict[Site, tuple[int, ...]]:
        """Latents by site, all listed explicitly.

        Raises:
            UserError: the set contains all latents of a site.
        """
        spelt = {site: ids for site, ids in self.items() if ids is not None}
        if len(spelt) < len(self.named) or self.unnamed is None:
            raise UserError(f"latents {str(self)!r}: 'all' is not possible here, write their numbers")
        return spelt

    def at(self, sites: Sequence[Site]) -> "LatentSet":
        """The set with sites renamed as in `sites` where both name the same tensor; unnamed latents get the only site.

        Raises:
            UserError: there are unnamed latents, and not exactly one site.
        """
        if self.unnamed == ():
            names = {site: next((known for known in sites if known.same_tensor(site)), site) for site in self}
            return LatentSet(tuple((names[site], groups) for site, groups in self.named))
        if len(sites) != 1:
            raise UserError(
                f"latents {str(self)!r} name no site, and the sites are {', '.join(map(str, sites)) or 'none'}: "
                "give one --site, or latents by site, as in 'resid_post.3: 281; 3,17 | resid_post.4: 5'"
            )
        return LatentSet(((sites[0], self.unnamed),))

    def size(self, dictionaries: Mapping[Site, "Dictionary"]) -> int:
        """Number of latents over all sites."""
        return sum(dictionaries[site].d_sae if ids is None else len(ids) for site, ids in self.items())

    def check(self, dictionaries: Mapping[Site, "Dictionary"]) -> None:
        """Raises UserError for a site without a dictionary, or a latent that its dictionary does not have."""
        for site, ids in self.items():
            if site not in dictionaries:
                raise UserError(
                    f"latents of {site}, but the dictionaries are for {', '.join(map(str, dictionaries))}: use these"
                )
            dictionaries[site].check_ids(ids or ())

    def facts(self) -> dict[str, list[int] | None]:
        """Latents by the names of sites, as JSON values; None: all latents of the site."""
        return {str(site): None if ids is None else list(ids) for site, ids in self.items()}


def _groups(ids: str, text: str) -> Groups:
    if ids.strip() == "all":
        return None
    if not IDS.fullmatch(ids):
        raise UserError(_malformed(text))
    return tuple(dict.fromkeys(tuple(dict.fromkeys(map(int, group.split(",")))) for group in ids.split(";")))


def _flat(groups: Iterable[Group]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(latent for group in groups for latent in group))


def _text(groups: Groups) -> str:
    return "all" if groups is None else "; ".join(",".join(map(str, group)) for group in groups)


def _malformed(text: str) -> str:
    return (
        f"latents {text!r}: write numbers, with semicolons between groups and commas inside one, as in 417 or 3,17;5; "
        "for several sites as in 'resid_post.3: 417 | resid_post.4: 3,17;5'"
    )
