"""The tables, as migrations: script n turns version n-1 of the schema into version n. Old scripts never change."""

from __future__ import annotations

from typing import Final

MIGRATIONS: Final = (
    """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE owners (id TEXT PRIMARY KEY, created_at INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE keys (
        id TEXT PRIMARY KEY, owner TEXT NOT NULL REFERENCES owners (id), created_at INTEGER NOT NULL
    ) WITHOUT ROWID;

    CREATE TABLE files (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        owner TEXT NOT NULL REFERENCES owners (id),
        key_id TEXT NOT NULL,
        filename TEXT NOT NULL,
        purpose TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        sha256 TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        expires_at INTEGER,
        status TEXT NOT NULL,
        status_details TEXT,
        num_examples INTEGER,
        is_deleted INTEGER NOT NULL DEFAULT 0
    );
    CREATE INDEX files_by_owner ON files (owner, seq);

    CREATE TABLE jobs (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        owner TEXT NOT NULL REFERENCES owners (id),
        key_id TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        finished_at INTEGER,
        status TEXT NOT NULL,
        wants_pause INTEGER NOT NULL DEFAULT 0,
        reason TEXT,
        base TEXT NOT NULL,
        model TEXT NOT NULL UNIQUE,
        is_published INTEGER NOT NULL DEFAULT 0,
        training_file TEXT NOT NULL REFERENCES files (id),
        validation_file TEXT REFERENCES files (id),
        seed INTEGER NOT NULL,
        settings TEXT NOT NULL,
        metadata TEXT,
        error TEXT,
        fine_tuned_model TEXT,
        result_files TEXT NOT NULL DEFAULT '[]',
        trained_tokens INTEGER
    );
    CREATE INDEX jobs_by_owner ON jobs (owner, seq);
    CREATE INDEX jobs_by_status ON jobs (status);

    CREATE TABLE events (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        job_id TEXT NOT NULL REFERENCES jobs (id),
        once TEXT,
        created_at INTEGER NOT NULL,
        level TEXT NOT NULL,
        type TEXT NOT NULL,
        message TEXT NOT NULL,
        data TEXT,
        UNIQUE (job_id, once)
    );
    CREATE INDEX events_by_job ON events (job_id, seq);

    CREATE TABLE checkpoints (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        job_id TEXT NOT NULL REFERENCES jobs (id),
        step INTEGER NOT NULL,
        created_at INTEGER NOT NULL,
        model TEXT NOT NULL,
        metrics TEXT NOT NULL,
        UNIQUE (job_id, step)
    );

    CREATE TABLE adapters (
        name TEXT PRIMARY KEY,
        owner TEXT NOT NULL REFERENCES owners (id),
        created_at INTEGER NOT NULL,
        source TEXT NOT NULL,
        root TEXT NOT NULL,
        job_id TEXT REFERENCES jobs (id),
        live_number INTEGER,
        next_number INTEGER NOT NULL DEFAULT 1,
        is_pinned INTEGER NOT NULL DEFAULT 0
    ) WITHOUT ROWID;
    CREATE INDEX adapters_by_job ON adapters (job_id);
    CREATE TABLE versions (
        name TEXT NOT NULL REFERENCES adapters (name),
        number INTEGER NOT NULL,
        digest TEXT NOT NULL,
        directory TEXT NOT NULL,
        num_bytes INTEGER NOT NULL,
        created_at INTEGER NOT NULL,
        step INTEGER,
        PRIMARY KEY (name, number)
    ) WITHOUT ROWID;

    CREATE TABLE idempotency (
        owner TEXT NOT NULL,
        route TEXT NOT NULL,
        key TEXT NOT NULL,
        digest TEXT NOT NULL,
        resource TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        PRIMARY KEY (owner, route, key)
    ) WITHOUT ROWID;
    """,
)
