"""Who may do what at the gateway: tokens and keys in, limits held, refusals that clients understand.

    access = Access.open(AccessSettings(store="access.db"))
    subject = await access.subject(request.headers.getlist("authorization"))
    async with access.admitted(subject, model, estimated_tokens) as ticket:
        ...
        ticket.used(prompt_tokens, completion_tokens)

`Refused` is what is raised in place of an answer; its `status`, `headers` and `body()` make one.
"""

from tunedock.access.policy import Policy
from tunedock.serve.access.gate import Access, Subject, Ticket
from tunedock.serve.access.refusal import Refused
from tunedock.serve.access.settings import AccessSettings, JwtSettings, check_loopback

__all__ = ["Access", "AccessSettings", "JwtSettings", "Policy", "Refused", "Subject", "Ticket", "check_loopback"]
