"""The tables of the access store, the same in SQLite and PostgreSQL. Times are seconds since 1970, UTC.

keys      API keys that were issued: a salted hash of each secret, never the secret
revoked   ids (`jti`) of JSON Web Tokens that are refused although they have not expired
policies  what a subject may do; a column that is null says "as everyone" (the row `*`)
usage     requests and tokens of a subject in one second of the last minute
days      tokens of a subject in one day (UTC)
slots     requests being answered; each belongs to a worker
workers   processes that answer, each with the time until which it is believed to be alive
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, Integer, MetaData, String, Table, Text

VERSION = 1
"""Of the tables. A store of another version is refused, never changed."""

LONGEST = 256
"""Characters of a subject, a label or a token's id."""

metadata = MetaData()

meta = Table("access_meta", metadata, Column("version", Integer, primary_key=True))

keys = Table(
    "access_keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("subject", String(LONGEST), nullable=False, index=True),
    Column("label", String(LONGEST), nullable=False),
    Column("salt", String(64), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("created", Double, nullable=False),
    Column("expires", Double),
    Column("revoked", Double),
    Column("last_used", Double),
)

revoked = Table(
    "access_revoked",
    metadata,
    Column("jti", String(LONGEST), primary_key=True),
    Column("at", Double, nullable=False),
)

policies = Table(
    "access_policies",
    metadata,
    Column("subject", String(LONGEST), primary_key=True),
    Column("models", Text),  # a JSON list of patterns
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("concurrent", BigInteger),
    Column("tokens_per_day", BigInteger),
)

usage = Table(
    "access_usage",
    metadata,
    Column("subject", String(LONGEST), primary_key=True),
    Column("second", BigInteger, primary_key=True, autoincrement=False),
    Column("requests", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
)

days = Table(
    "access_days",
    metadata,
    Column("subject", String(LONGEST), primary_key=True),
    Column("day", String(10), primary_key=True),  # 2026-11-29
    Column("requests", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
)

slots = Table(
    "access_slots",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("subject", String(LONGEST), nullable=False, index=True),
    Column("worker", String(32), nullable=False, index=True),
)

workers = Table(
    "access_workers",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("alive_until", Double, nullable=False),
)
