"""What the LlamaIndex and LangChain integrations need of a server; it imports neither framework.

Answers come by the frameworks' own clients of OpenAI's API. Here are the chunks, the fields and options of a model that
a server answers for, its reports and its errors.
"""

from .errors import servers_errors
from .handle import ServerHandle
from .options import asked, server_fields
from .per_process import PerProcess
from .reports import Unreported, report_in, unreported, with_usage

__all__ = [
    "PerProcess",
    "ServerHandle",
    "Unreported",
    "asked",
    "report_in",
    "server_fields",
    "servers_errors",
    "unreported",
    "with_usage",
]
