"""Results of an experiment's stages, stored as they are measured and read back as the same values."""

import base64
import logging
import math
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints, runtime_checkable

import numpy as np

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.records.provenance import versions
from saepatch.runs.measurements import Measurements

log = logging.getLogger(__name__)

Result = TypeVar("Result")
ARRAY = {"dtype", "shape", "zlib"}  # the keys of an array


@runtime_checkable
class KeptValues(Protocol):
    """JSON values by name; those of an earlier start are not measured again."""

    def get(self, name: str, measure: Callable[[], Any]) -> Any: ...


def deciding(
    config: Any, model: LanguageModel, saes: Mapping[Site, Dictionary], free: tuple[str, ...] = ("out", "track")
) -> dict[str, Any]:
    """By name, what must be the same for results to belong to one run: all settings but those in `free`, and hashes."""
    return {
        "settings": {name: value for name, value in asdict(config).items() if name not in free},
        "model's weights": model.fingerprint,
        "dictionaries": {str(site): dictionary.fingerprint for site, dictionary in saes.items()},
        "versions": versions(),
    }


class KeptResults:
    """Results by name, as in `maps/streams/denoise`: those of an earlier start are not computed again.

    `seconds` is the time that each stage (the first part of a name) took, over all starts; `processor` is the
    processor time of all its threads, which other load on the machine affects little.
    """

    def __init__(self, kept: Measurements, seconds: dict[str, float]) -> None:
        self._kept, self.seconds = kept, seconds
        self.processor: dict[str, float] = {}

    def get(self, name: str, kind: type[Result], measure: Callable[[], Result]) -> Result:
        """The result of this name, measured if there is none yet; `kind` is its dataclass."""
        return from_json(kind, self.value(name, lambda: to_json(measure())))

    def value(self, name: str, measure: Callable[[], Any]) -> Any:
        """The JSON value of this name, measured if there is none yet."""
        stage = name.split("/")[0]
        if stage not in self.seconds:
            log.info("%s …", stage)

        def measured() -> dict[str, Any]:
            start, used = time.monotonic(), time.process_time()
            result = measure()
            return {
                "seconds": time.monotonic() - start,
                "processor": time.process_time() - used,
                "result": result,
            }

        value = self._kept.get(name, measured)
        for times, kind in ((self.seconds, "seconds"), (self.processor, "processor")):
            times[stage] = round(times.get(stage, 0.0) + value.get(kind, 0.0), 2)
        return value["result"]

    def of_stage(self, stage: str) -> KeptValues:
        """The JSON values of one stage, for measurements that have no stages."""
        return _StageValues(self, stage)


@dataclass(frozen=True, eq=False)
class _StageValues:
    results: KeptResults
    stage: str

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        return self.results.value(f"{self.stage}/{name}", measure)


def to_json(value: Any) -> Any:
    """A value of dataclasses, mappings, sequences and arrays as JSON; arrays are compressed without loss."""
    if is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, np.ndarray):
        data = base64.b64encode(zlib.compress(np.ascontiguousarray(value).tobytes(), 1)).decode()
        return {"dtype": str(value.dtype), "shape": list(value.shape), "zlib": data}
    if isinstance(value, Mapping):
        return {name: to_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def from_json(kind: Any, value: Any) -> Any:
    """The value of a type that `to_json` wrote."""
    if isinstance(value, dict) and value.keys() == ARRAY:
        data = zlib.decompress(base64.b64decode(value["zlib"]))
        return np.frombuffer(data, dtype=value["dtype"]).reshape(value["shape"]).copy()
    if is_dataclass(kind) and isinstance(kind, type):
        types = _types(kind)
        return kind(**{name: from_json(types[name], item) for name, item in value.items()})
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None else from_json(next(each for each in arguments if each is not type(None)), value)
    if isinstance(value, dict):
        return {name: from_json(arguments[1], item) for name, item in value.items()}
    if origin is tuple:
        items = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return tuple(from_json(item_kind, item) for item_kind, item in zip(items, value, strict=True))
    if isinstance(value, list):
        return [from_json(arguments[0], item) for item in value]
    return math.nan if isinstance(value, float) and math.isnan(value) else value  # one NaN, so that intervals are equal


@cache
def _types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
