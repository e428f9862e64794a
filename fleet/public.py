"""The public names of the package, which ``import fleet`` does not load until one is used."""

from fleet.errors import FleetError as FleetError
from fleet.protocol.modes import Mode as Mode
from fleet.protocol.prompt import ChatMessage as ChatMessage
from fleet.protocol.prompt import PromptRequest as PromptRequest
from fleet.protocol.prompt import Reply as Reply
from fleet.server.local_fleet import LocalFleet as LocalFleet
from fleet.transport.answers import Answer as Answer
from fleet.transport.answers import AsyncAnswer as AsyncAnswer
from fleet.transport.fleet_client import AsyncFleetClient as AsyncFleetClient
from fleet.transport.fleet_client import FleetClient as FleetClient
