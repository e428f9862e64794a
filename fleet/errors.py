"""The tree of every error that this project raises on purpose.

FleetError
 +- ConfigError                 a value on the command line or in a file is not usable
 |   +- MissingExtraError       an optional extra is not installed
 |   +- RolloutError            a roll-out cannot start, or not change in that way
 |       +- UnknownRolloutError no roll-out has that id
 +- BundleError                 a bundle is missing, altered, or made for something else
 |   +- HeadsError              a file of exit heads does not fit
 |   +- ExportError             a model cannot be exported
 +- SoftwareError               a version of the device's software cannot be installed
 +- ProtocolError               bytes or messages that break the rules of the wire
 |   +- DecodeError             bytes that are no message
 |   +- OversizedError          more bytes than the limit
 |   +- OutOfOrderError         a message that is not legal in this state
 |   +- TopicError              a topic, or a name in it, that is not valid
 +- PromptError                 an app's request that cannot be served
 |   +- RefusedPromptError      a request that a device refused
 |   +- RequestFieldError       a field of an HTTP request that cannot be honoured
 |   +- UnknownModelError       a model that does not exist, or that the app may not use
 |   +- BusyError               more requests at once than the device accepts
 |   +- DeadlineError           a generation took longer than its app allowed
 |   +- CloudError              only the cloud may decide, and no worker is available
 |   +- ConstraintError         a schema or regular expression that cannot be used
 +- PoolFullError               the worker has no memory for another session
 +- LinkError                   the broker cannot be reached, or refuses the client
 |   +- OfflineError            a device is offline now
 |   +- ServiceError            the fleet's HTTPS service cannot be reached, or failed
 |       +- ServiceAwayError    the service may respond later
 +- IdentityError               an identity folder or a certificate is missing or wrong
 |   +- StateError              a change that is not legal in an identity's state
 |   +- AccessError             an identity without the right that it needs
 |   +- CsrError                a signing request that is malformed, or has another kind of key
 |   +- CredentialsError        no certificate, or one that the registry does not know
 |   +- TokenError              an enrolment token that is not usable
 |       +- UnknownTokenError   a token that the registry does not know
 |       +- UsedTokenError      a token that another key has used
 |       +- ExpiredTokenError   a token whose time is over
 |       +- TokenNameError      a signing request for another name than the token's
 +- RegistryError               the registry cannot be read or written
     +- UnknownDeviceError      no identity of that name is enrolled
     +- ValueRefusedError       the database never accepts this value
     +- ReportError             a report that can never be stored

A message reports the expected value, the actual value, and what to do.
"""

from __future__ import annotations


class FleetError(Exception):
    """Root of the tree. `code` is what travels on the wire and in ``--json``."""

    code = "error"


class ConfigError(FleetError):
    """A value on the command line or in a configuration file is not usable."""

    code = "bad_config"


class MissingExtraError(ConfigError):
    """An optional extra of the distribution is not installed."""

    code = "missing_extra"


class RolloutError(ConfigError):
    """A roll-out cannot start, or a change is not legal in its state."""

    code = "bad_rollout"


class UnknownRolloutError(RolloutError):
    """No roll-out has this id."""

    code = "unknown_rollout"


class BundleError(FleetError):
    """A bundle is missing, altered, or made for something else."""

    code = "bad_bundle"


class HeadsError(BundleError):
    """A file of exit heads does not fit the model."""

    code = "bad_heads"


class ExportError(BundleError):
    """A model cannot be exported."""

    code = "export_failed"


class SoftwareError(FleetError):
    """A version of the device's software is damaged, not signed, or does not fit the device."""

    code = "bad_software"


class ProtocolError(FleetError):
    """Bytes or messages that break the rules of the wire."""

    code = "protocol"


class DecodeError(ProtocolError):
    """Bytes that are no message."""

    code = "undecodable"


class OversizedError(ProtocolError):
    """More bytes than the limit."""

    code = "oversized"


class OutOfOrderError(ProtocolError):
    """A message that is not legal in the session's state."""

    code = "out_of_order"


class TopicError(ProtocolError):
    """A topic, or a name in one, that is not valid."""

    code = "bad_topic"


class PromptError(FleetError):
    """An app's request that cannot be served as it is."""

    code = "bad_prompt"


class RefusedPromptError(PromptError):
    """A request that a device refused. `code` is the code of the device's error."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class RequestFieldError(PromptError):
    """A field of an HTTP request that has no meaning here, or a value that it cannot have.

    `field` is its name, with the path to it.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class UnknownModelError(PromptError):
    """A model that does not exist, or that the app may not use."""

    code = "unknown_model"


class BusyError(PromptError):
    """More requests at once than the device accepts."""

    code = "busy"


class DeadlineError(PromptError):
    """A generation took longer than its app allowed."""

    code = "deadline"


class CloudError(PromptError):
    """Only the cloud may decide on this request's tokens, and no worker is available."""

    code = "no_cloud"


class ConstraintError(PromptError):
    """A JSON schema or a regular expression that no answer can follow, or that is too complex."""


class PoolFullError(FleetError):
    """The worker's budget, or its machine, has no memory for another session of that size."""

    code = "busy"


class LinkError(FleetError):
    """The broker cannot be reached, or refuses the client."""

    code = "link"


class OfflineError(LinkError):
    """The device is offline; it may be back in `retry_after_s` seconds or later."""

    code = "offline"
    retry_after_s = 15.0


class ServiceError(LinkError):
    """The fleet's HTTPS service cannot be reached, is not trusted, or failed."""

    code = "service"


class ServiceAwayError(ServiceError):
    """The service does not respond now; it may in `retry_after_s` seconds or later."""

    code = "service_away"

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class IdentityError(FleetError):
    """An identity folder or a certificate is missing or wrong."""

    code = "bad_identity"


class StateError(IdentityError):
    """A change that is not legal in an identity's state."""

    code = "bad_state"


class AccessError(IdentityError):
    """An identity does not have the right that it needs."""

    code = "not_allowed"


class CsrError(IdentityError):
    """A certificate signing request is malformed, or its key is of another kind than P-256."""

    code = "bad_csr"


class CredentialsError(IdentityError):
    """The client has shown no certificate, or one that the registry does not know."""

    code = "bad_credentials"


class TokenError(IdentityError):
    """An enrolment token is unknown, used, too old, or for another name."""

    code = "bad_token"


class UnknownTokenError(TokenError):
    """The registry does not know the token, or a newer one has replaced it."""

    code = "unknown_token"


class UsedTokenError(TokenError):
    """Another key has used the token."""

    code = "used_token"


class ExpiredTokenError(TokenError):
    """The token has expired."""

    code = "expired_token"


class TokenNameError(TokenError):
    """A signing request has another name than the token or certificate that came with it."""

    code = "other_name"


class RegistryError(FleetError):
    """The registry cannot be read or written."""

    code = "registry"


class UnknownDeviceError(RegistryError):
    """No identity of that name is enrolled."""

    code = "unknown_device"


class ValueRefusedError(RegistryError):
    """The registry's database never accepts this value."""

    code = "value_refused"


class ReportError(RegistryError):
    """A report that can never be stored."""

    code = "bad_report"
