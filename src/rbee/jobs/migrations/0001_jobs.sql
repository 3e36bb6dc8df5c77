-- Jobs, their requests, the logs of jobs, workers and hives, and how far each captured file was read.
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

CREATE TABLE jobs (
    job_id TEXT PRIMARY KEY,
    operation TEXT NOT NULL,
    state TEXT NOT NULL,
    reason TEXT,
    message TEXT,
    phase TEXT,
    priority INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    owner TEXT,
    model TEXT,
    hive_id TEXT,
    worker_id TEXT,
    principal TEXT NOT NULL,
    parent_job_id TEXT,
    correlation_id TEXT NOT NULL,
    idempotency_key TEXT,
    body_hash TEXT,
    created_at REAL NOT NULL,
    started_at REAL,
    ended_at REAL,
    deadline_at REAL,
    is_cancel_requested INTEGER NOT NULL,
    is_stored INTEGER NOT NULL,
    is_kept INTEGER NOT NULL,
    progress BLOB,
    result BLOB,
    error BLOB,
    labels BLOB
) WITHOUT ROWID;
CREATE INDEX jobs_by_state ON jobs (state, job_id);
CREATE INDEX jobs_by_correlation ON jobs (correlation_id, job_id);
CREATE UNIQUE INDEX jobs_by_idempotency ON jobs (principal, idempotency_key) WHERE idempotency_key IS NOT NULL;

CREATE TABLE requests (job_id TEXT PRIMARY KEY, body BLOB NOT NULL);

CREATE TABLE log_heads (
    log_id TEXT PRIMARY KEY,
    first_seq INTEGER NOT NULL,
    last_seq INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,
    is_ended INTEGER NOT NULL
) WITHOUT ROWID;

-- One row a log and batch: events joined by newlines (as frames since 0002). The rowid keeps the order they came in.
CREATE TABLE log_rows (log_id TEXT NOT NULL, last_seq INTEGER NOT NULL, body BLOB NOT NULL);
CREATE UNIQUE INDEX log_rows_by_seq ON log_rows (log_id, last_seq);

-- `part`: how many parts of an overlong line were read before the cursor.
CREATE TABLE cursors (source TEXT PRIMARY KEY, cursor INTEGER NOT NULL, part INTEGER NOT NULL) WITHOUT ROWID;

-- Workers the queen asked for, so that their first line finds its job, and ends that wait for their last lines.
CREATE TABLE workers (
    worker_id TEXT PRIMARY KEY,
    hive_id TEXT NOT NULL,
    model TEXT NOT NULL,
    job_id TEXT,
    exit_line BLOB
) WITHOUT ROWID;
