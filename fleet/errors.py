"""Every error that this project raises on purpose.

FleetError
 +- ConfigError             a value on the command line or in a file is not usable
 |   +- MissingExtraError   an optional part is not installed
 |   +- RolloutError        a roll-out that cannot be started, or not be changed in that way
 +- BundleError             a bundle is missing, altered, or for something else
 |   +- HeadsError          a file of exit heads does not fit
 |   +- ExportError         a model cannot be exported
 +- ProtocolError           bytes or messages that break the wire's rules
 |   +- DecodeError         bytes that are no message
 |   +- OversizedError      more bytes than the limit
 |   +- OutOfOrderError     a message that is not legal in this state
 |   +- TopicError          a topic or a name in it that is not ours
 +- PromptError             a request of an app that cannot be served
 |   +- BusyError           more requests at once than the device takes
 |   +- DeadlineError       an answer took longer than its app allowed
 |   +- CloudError          an answer that only the cloud may give, and no worker does
 +- LinkError               the broker cannot be reached, or refuses us
 |   +- ServiceError        the fleet's HTTPS service cannot be reached, or failed
 |       +- ServiceAwayError   it may answer when it is asked again later
 +- IdentityError           an identity folder or certificate is missing or wrong
 |   +- StateError          a change that is not legal in an identity's state
 |   +- AccessError         an identity that may not have what it asks for
 |   +- CsrError            a signing request that is none, or for a key that we do not certify
 |   +- CredentialsError    no certificate, or one that the registry does not know
 |   +- TokenError          an enrolment token that is not usable
 |       +- UnknownTokenError, UsedTokenError, ExpiredTokenError
 |       +- TokenNameError  for another name than the signing request's
 +- RegistryError           the registry cannot answer
     +- UnknownDeviceError  nobody enrolled that name
     +- ReportError         a report that can never be stored

A message says what was expected, what came, and what to do.
"""

from __future__ import annotations


class FleetError(Exception):
    """Root of the tree. `code` is what travels on the wire and in ``--json``."""

    code = "error"


class ConfigError(FleetError):
    """A value on the command line or in a configuration file is not usable."""

    code = "bad_config"


class MissingExtraError(ConfigError):
    """An optional part of the distribution is not installed."""

    code = "missing_extra"


class RolloutError(ConfigError):
    """A roll-out that cannot be started, or a change that is not legal in its state."""

    code = "bad_rollout"


class BundleError(FleetError):
    """A bundle is missing, altered, or made for something else."""

    code = "bad_bundle"


class HeadsError(BundleError):
    """A file of exit heads does not fit the model."""

    code = "bad_heads"


class ExportError(BundleError):
    """A model cannot be exported."""

    code = "export_failed"


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
    """A topic, or a name in one, that is not ours."""

    code = "bad_topic"


class PromptError(FleetError):
    """A request of an app that cannot be served as it is."""

    code = "bad_prompt"


class BusyError(PromptError):
    """More requests at once than the device takes."""

    code = "busy"


class DeadlineError(PromptError):
    """An answer took longer than its app allowed."""

    code = "deadline"


class CloudError(PromptError):
    """Only the cloud may decide on this answer's tokens, and no worker does."""

    code = "no_cloud"


class LinkError(FleetError):
    """The broker cannot be reached, or refuses us."""

    code = "link"


class ServiceError(LinkError):
    """The fleet's HTTPS service cannot be reached, is not whom we trust, or failed."""

    code = "service"


class ServiceAwayError(ServiceError):
    """The service does not answer now; asked again in `retry_after_s` seconds or later it may."""

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
    """An identity may not have what it asks for."""

    code = "not_allowed"


class CsrError(IdentityError):
    """A certificate signing request is none, or its key is not of the kind that we certify."""

    code = "bad_csr"


class CredentialsError(IdentityError):
    """Who asks has shown no certificate, or one that the registry does not know."""

    code = "bad_credentials"


class TokenError(IdentityError):
    """An enrolment token is unknown, used, too old, or for another name."""

    code = "bad_token"


class UnknownTokenError(TokenError):
    """No such token was made, or a newer one has replaced it."""

    code = "unknown_token"


class UsedTokenError(TokenError):
    """Another key has used the token."""

    code = "used_token"


class ExpiredTokenError(TokenError):
    """The token's time is over."""

    code = "expired_token"


class TokenNameError(TokenError):
    """A signing request is for another name than the token, or the certificate, that came with it."""

    code = "other_name"


class RegistryError(FleetError):
    """The registry cannot answer."""

    code = "registry"


class UnknownDeviceError(RegistryError):
    """Nobody enrolled that name."""

    code = "unknown_device"


class ValueRefusedError(RegistryError):
    """The registry's database does not take a value, and never will."""

    code = "value_refused"


class ReportError(RegistryError):
    """A report that can never be stored."""

    code = "bad_report"
