"""Cost models of every split of a bundle, from the speeds of a device and a worker (ADR 0043).

Steps follow from the number of layers and heads on either side. The number of round trips depends
on the share of the device's drafts that the full model agrees with. Both were measured in the
answers of the fit; drafts that are never accepted need a round trip for each token, and what is
between or beyond is interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

import numpy as np
from msgspec.structs import replace

from fleet.bundles.manifest import Manifest
from fleet.errors import ConfigError
from fleet.exits.calibration import CurvePoint
from fleet.exits.thresholds import OFF
from fleet.planning.cost_model import (
    CLOUD_ONLY,
    NO_LINK,
    PLAIN_SUM,
    STANDALONE,
    CostFit,
    MachineSpeed,
    ServingSetting,
    StepCounts,
    WholeModel,
)
from fleet.planning.machine_speeds import MEASURE, MachineSpeeds
from fleet.protocol.modes import Mode

MEASURED: Final = "measured"
INTERPOLATED: Final = "interpolated"
AT_MOST: Final = "at most"
"""No agreement of the exit was measured: times are those without any accepted draft."""
NOT_MEASURED: Final = "not measured"
CALIBRATED: Final = "collaborative@calibrated"
MIN_TRIPS: Final = 1 / 17  # a token: a request has at most 16 drafts
FLOAT16_BYTES: Final = 2
FLOAT32_BYTES: Final = 4
MESSAGE_BYTES: Final = 100  # of a message in addition to its hidden states
FITTED_UPLOADS: Final = 1.8
"""Positions that are uploaded for a token at the fitted exit, from the bytes of its rows: drafts
that the worker rejects are uploaded in vain."""

WHOLE_AGREEMENT: Final[dict[str, dict[str, float]]] = {
    "SmolLM2-135M-Instruct": {"balanced": 0.9755, "int4": 0.9640, "int8": 0.9668}
}
"""Share of the tokens of a whole model in a preset that equal those in float32; the source is
docs/performance.md."""


def whole_model(manifest: Manifest, head_layers: float) -> WholeModel:
    """Return the needs of the whole model on a device, from the sizes of a bundle's files."""
    model = manifest.model
    sizes = {file.path: file.num_bytes for file in manifest.files}
    edge = sum(size for path, size in sizes.items() if path.startswith("edge/"))
    blocks = sum(size for path, size in sizes.items() if path.startswith("edge/block_"))
    caches = 2 * model.num_key_value_heads * model.head_dim * FLOAT32_BYTES
    return WholeModel(
        num_layers=model.num_layers,
        head_layers=head_layers,
        tables_mb=(edge - blocks) / 1e6,
        layer_mb=blocks / manifest.exits[-1] / 1e6,
        cache_kb=caches / 1e3,
        agreement=whole_agreement(manifest),
    )


def whole_agreement(manifest: Manifest) -> float | None:
    """Return the share of a whole model's tokens that equal those in float32, None if not known."""
    if manifest.quantization == "fp32":
        return 1.0
    of_bundle = manifest.parity.get(f"same_as_pytorch.{manifest.model.num_layers}")
    of_model = WHOLE_AGREEMENT.get(manifest.model.name, {})
    return of_model.get(manifest.quantization, of_bundle)


def worker_speeds(fit: CostFit, manifest: Manifest) -> MachineSpeeds:
    """Return the speeds of the worker that a fit was measured with.

    Raises:
        ConfigError: the fit is of another model.
    """
    if fit.model != manifest.model.name or fit.whole is None:
        raise ConfigError(
            f"no worker was measured with {manifest.model.name}; measure one with "
            f"'{MEASURE['worker']}' and pass --worker FILE"
        )
    layer_ms = fit.cloud.step_ms / (fit.whole.num_layers + fit.whole.head_layers)
    return MachineSpeeds(
        side="worker",
        model=fit.model,
        weights="float32",
        processor=str(fit.machine.get("processor")),
        num_threads=1,
        layer_ms=layer_ms,
        head_ms=layer_ms * fit.whole.head_layers,
        prompt_layer_ms=fit.cloud.step_ms * fit.cloud.prompt_steps / fit.whole.num_layers,
    )


def exit_agreement(manifest: Manifest, layer: int) -> tuple[float | None, str]:
    """Return the agreement of an exit with the full model, and its basis.

    Between calibrated exits it is interpolated over the depth, from none without a layer.
    """
    calibration = manifest.calibration
    if calibration is None:
        return None, NOT_MEASURED
    known = {int(name): one.agreement for name, one in calibration.exits.items()}
    if layer in known:
        return known[layer], MEASURED
    points = sorted({0: 0.0, **known, manifest.model.num_layers: 1.0}.items())
    layers, agreements = zip(*points, strict=True)
    return float(np.interp(layer, layers, agreements)), INTERPOLATED


def deployed_point(manifest: Manifest) -> CurvePoint | None:
    """Return the measured point whose thresholds are nearest to the bundle's, if there is one."""
    calibration = manifest.calibration
    if calibration is None or min(manifest.thresholds) >= OFF:
        return None
    deployed = np.array(manifest.thresholds)
    return min(calibration.curve, key=lambda one: float(np.abs(one.thresholds - deployed).sum()))


def accepted_below(agreement: float, share: float) -> float:
    """Return the accepted share of drafts below the threshold, which are a `share` of all.

    An exit's confident tokens count as agreeing.
    """
    return max(0.0, agreement - (1 - share)) / share if share > 0 else 0.0


def split_fits(
    manifest: Manifest, device: MachineSpeeds, worker: MachineSpeeds, fitted: CostFit
) -> tuple[CostFit, ...]:
    """Return a cost model for each split below the last layer, the deepest first.

    The numbers of round trips, and what a message costs, are those of `fitted`.

    Raises:
        ConfigError: the bundle has no such split.
    """
    layers = [layer for layer in manifest.splits if layer < manifest.model.num_layers]
    if not layers:
        raise ConfigError(
            f"bundle {manifest.bundle_id} holds the whole model on the device and has no split; "
            "give a bundle with an earlier upload layer to compare"
        )
    return tuple(
        SplitModel(manifest, device, worker, fitted, layer).fit() for layer in reversed(layers)
    )


@dataclass(frozen=True)
class SplitModel:
    """One split of a bundle between two machines."""

    manifest: Manifest
    device: MachineSpeeds
    worker: MachineSpeeds
    fitted: CostFit
    layer: int

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return self.manifest.model.num_layers

    @property
    def upload_layer(self) -> int:
        """The layer whose hidden states are uploaded."""
        return self.manifest.upload_layer_of(self.layer)

    @property
    def edge_step_ms(self) -> float:
        """The device's time for a token: its layers, and the exits until one is confident."""
        return self.device.step_ms(self.layer, self.num_heads)

    @property
    def cloud_step_ms(self) -> float:
        """The worker's time for a verify request: its layers from the upload layer on."""
        return self.worker.step_ms(self.num_layers - self.upload_layer)

    @property
    def num_heads(self) -> float:
        """The mean number of exits of the split that a token evaluates.

        Without a calibration it is the highest. The last exit drafts even if it is off.
        """
        count = self.manifest.exits.index(self.layer) + 1
        thresholds = self.manifest.thresholds[:count]
        point = deployed_point(self.manifest)
        coverage = point.coverage if point else (0.0,) * count
        reached = [1 - sum(coverage[:i]) for i in range(count)]
        earlier = zip(reached, thresholds[:-1], strict=False)
        return reached[-1] + sum(share for share, threshold in earlier if threshold < OFF)

    def fit(self) -> CostFit:
        """Return the cost model of this split."""
        agreement, basis = exit_agreement(self.manifest, self.layer)
        head_layers = self.device.head_ms / self.device.layer_ms
        exits = tuple(layer for layer in self.manifest.exits if layer <= self.layer)
        return replace(
            self.fitted,
            model=self.manifest.model.name,
            bundle_id=self.manifest.bundle_id,
            exits=exits,
            split_layer=self.layer,
            machine={"processor": self.device.processor},
            edge=self._speed(self.device, self.fitted.edge),
            cloud=self._speed(self.worker, self.fitted.cloud),
            errors={},
            settings=tuple(self._settings(agreement, basis)),
            whole=whole_model(self.manifest, head_layers),
            exit_agreement=agreement,
        )

    def _speed(self, side: MachineSpeeds, fitted: MachineSpeed) -> MachineSpeed:
        """Return the speed in steps of the whole model; a message costs what it did in the fit."""
        step_ms = side.step_ms(self.num_layers)
        prompt_steps = side.prompt_layer_ms * self.num_layers / step_ms
        message_steps = fitted.message_steps * fitted.step_ms / step_ms
        return MachineSpeed(step_ms, prompt_steps, message_steps)

    def _settings(self, agreement: float | None, basis: str) -> list[ServingSetting]:
        settings = [self._standalone(agreement, basis), self._verified(agreement, basis)]
        point = deployed_point(self.manifest)
        if point is not None and agreement is not None:
            settings.append(self._collaborative(agreement, point))
        settings.append(self._cloud_only())
        return settings

    def _standalone(self, agreement: float | None, basis: str) -> ServingSetting:
        return ServingSetting(
            name=STANDALONE,
            mode=STANDALONE,
            threshold=None,
            agreement=agreement,
            prompt_edge=self.layer / self.num_layers,
            prompt_cloud=0.0,
            prompt_bytes=0.0,
            token_bytes=0.0,
            counts=(self._counts(0.0, round_trips=0.0, messages=0.0, offload_rate=0.0),),
            total=NO_LINK,
            first=NO_LINK,
            basis=basis,
        )

    def _verified(self, agreement: float | None, basis: str) -> ServingSetting:
        """Return `verified`: each token needs a verdict."""
        of_fit = self._fitted_setting(Mode.VERIFIED)
        accepted = agreement or 0.0
        ratios = [self._ratio(1 - one.offload_rate, accepted) for one in of_fit.counts]
        counts = [
            self._trips(one, ratio, (1.0, 1.0), 1 - ratio * (1 - one.offload_rate))
            for one, ratio in zip(of_fit.counts, ratios, strict=True)
        ]
        return self._assisted(of_fit, 1.0, counts, fmean(ratios), self._basis(basis))

    def _collaborative(self, agreement: float, point: CurvePoint) -> ServingSetting:
        """Return `collaborative`: a token of no confident exit needs a verdict.

        Only drafts of these tokens can be rejected, so fewer of them are accepted than in
        `verified`.
        """
        of_fit = self._fitted_setting(CALIBRATED)
        fitted = zip(of_fit.counts, self._fitted_setting(Mode.VERIFIED).counts, strict=True)
        exits = self.manifest.exits.index(self.layer) + 1
        share = 1 - sum(point.coverage[:exits])
        accepted = accepted_below(agreement, share)
        ratios = [
            self._ratio(accepted_below(1 - verified.offload_rate, one.offload_rate), accepted)
            for one, verified in fitted
        ]
        counts = [
            self._trips(one, ratio, (share, one.offload_rate), share)
            for one, ratio in zip(of_fit.counts, ratios, strict=True)
        ]
        basis = self._basis(MEASURED)
        return self._assisted(of_fit, point.agreement, counts, fmean(ratios) * share, basis)

    def _cloud_only(self) -> ServingSetting:
        of_fit = self._fitted_setting(CLOUD_ONLY)
        counts = tuple(replace(one, edge_steps=0.0, cloud_steps=1.0) for one in of_fit.counts)
        changes = {"prompt_cloud": 1.0, "counts": counts, "total": PLAIN_SUM, "first": PLAIN_SUM}
        return replace(of_fit, **changes)

    def _assisted(
        self,
        of_fit: ServingSetting,
        agreement: float,
        counts: Sequence[StepCounts],
        accepted: float,
        basis: str,
    ) -> ServingSetting:
        """Return a setting with the worker's help, from its counts by round trip."""
        num_bytes = FLOAT16_BYTES * self.manifest.model.hidden_size
        positions = 1 + (FITTED_UPLOADS - 1) * accepted
        messages = fmean(one.messages for one in counts)
        return replace(
            of_fit,
            name=of_fit.mode,
            agreement=agreement,
            prompt_edge=self.layer / self.num_layers,
            prompt_cloud=1 - self.upload_layer / self.num_layers,
            prompt_bytes=num_bytes,
            token_bytes=positions * num_bytes + messages * MESSAGE_BYTES,
            counts=tuple(counts),
            total=PLAIN_SUM,
            first=PLAIN_SUM,
            basis=basis,
        )

    def _trips(
        self,
        one: StepCounts,
        ratio: float,
        shares: tuple[float, float],
        offload_rate: float,
    ) -> StepCounts:
        """Return the counts of a token at one round trip of the fit.

        `shares` are those of the tokens that need a verdict, here and in the fit. Without accepted
        drafts each of them makes a round trip.
        """
        share, fitted_share = shares
        per_verdict = 1 + (one.round_trips / fitted_share - 1) * ratio
        trips = share * max(MIN_TRIPS, per_verdict)
        messages = trips * one.messages / one.round_trips
        rtt_ms = one.rtt_ms * self.edge_step_ms / self._fitted_step_ms
        return self._counts(rtt_ms, round_trips=trips, messages=messages, offload_rate=offload_rate)

    def _counts(
        self, rtt_ms: float, *, round_trips: float, messages: float, offload_rate: float
    ) -> StepCounts:
        """Return counts with one step of the device a token; further drafts run while it waits."""
        return StepCounts(
            rtt_ms=rtt_ms,
            edge_steps=self.edge_step_ms / self.device.step_ms(self.num_layers),
            cloud_steps=round_trips * self.cloud_step_ms / self.worker.step_ms(self.num_layers),
            round_trips=round_trips,
            messages=messages,
            offload_rate=offload_rate,
        )

    @property
    def _fitted_step_ms(self) -> float:
        """The time of a token on the fitted device, up to its split."""
        whole = self.fitted.whole
        if whole is None:
            return self.fitted.edge.step_ms
        layers = self.fitted.split_layer + whole.head_layers
        return self.fitted.edge.step_ms * layers / (whole.num_layers + whole.head_layers)

    @property
    def _is_fitted(self) -> bool:
        """Whether the answers of the fit were those of this model and split."""
        fitted = (self.fitted.model, self.fitted.split_layer)
        return (self.manifest.model.name, self.layer) == fitted

    def _ratio(self, fitted: float, accepted: float) -> float:
        """Return the accepted share of drafts over that of the fit; 0 if it is not known."""
        if accepted and self._is_fitted:
            return 1.0
        return accepted / fitted if fitted > 0 else 0.0

    def _basis(self, of_agreement: str) -> str:
        """Return the basis of the number of round trips."""
        if of_agreement == NOT_MEASURED:
            return AT_MOST
        return of_agreement if self._is_fitted else INTERPOLATED

    def _fitted_setting(self, name: str) -> ServingSetting:
        """Return a setting of the fit; raise ConfigError when it is missing."""
        for setting in self.fitted.settings:
            if setting.name == name:
                return setting
        raise ConfigError(f"the fit lacks {name}; fit it again with 'fleet bench paper --fit'")
