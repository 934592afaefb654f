"""A balance loss over devices (DeepSeekMoE, Dai et al. 2024)."""

import dataclasses

from jaxtyping import Array, Float

from moejax.core.errors import ConfigError
from moejax.core.fields import Count
from moejax.routing.losses.balance import Balance
from moejax.routing.losses.base import losses


@losses.register("device_balance")
@dataclasses.dataclass(frozen=True)
class DeviceBalance(Balance):
    """`coef * D * sum_d F_d P_d` over D devices of `e / D` neighbouring experts each, F_d and P_d being the sums of f and P over a
    device's experts (DeepSeekMoE, Dai et al. 2024, eq. 15-17): devices are to be loaded alike, experts of one device need not.

    Fields as in `Balance`, and on the same scale: 1 under uniform routing, D when one device takes everything.

    Attributes:
      devices: D.
    """

    coef: float = 0.05
    devices: Count = 1

    def _unevenness(self, share: Float[Array, "*g e"], mean_prob: Float[Array, "*g e"]) -> Float[Array, "*g"]:
        if share.shape[-1] % self.devices:
            raise ConfigError(f"losses.device_balance.devices={self.devices} must divide num_experts={share.shape[-1]}")
        share, mean_prob = (x.reshape(*x.shape[:-1], self.devices, -1).sum(-1) for x in (share, mean_prob))
        return super()._unevenness(share, mean_prob)
