-- Deadlines and leases; an index for every filter of lists and for whose turn it is; how many jobs are in each state.
ALTER TABLE jobs ADD COLUMN queue_deadline_at REAL;
ALTER TABLE jobs ADD COLUMN lease_until REAL;

CREATE INDEX jobs_by_operation ON jobs (operation, job_id);
CREATE INDEX jobs_by_model ON jobs (model, job_id) WHERE model IS NOT NULL;
CREATE INDEX jobs_by_hive ON jobs (hive_id, job_id) WHERE hive_id IS NOT NULL;
CREATE INDEX jobs_by_worker ON jobs (worker_id, job_id) WHERE worker_id IS NOT NULL;
CREATE INDEX jobs_waiting ON jobs (operation, priority DESC, job_id) WHERE state = 'queued';
CREATE INDEX jobs_leased ON jobs (lease_until) WHERE lease_until IS NOT NULL;
CREATE INDEX jobs_due ON jobs (min(coalesce(queue_deadline_at, deadline_at), coalesce(deadline_at, queue_deadline_at)))
    WHERE state = 'queued' AND coalesce(queue_deadline_at, deadline_at) IS NOT NULL;
CREATE INDEX jobs_ended ON jobs (ended_at, job_id) WHERE ended_at IS NOT NULL;

CREATE TABLE counts (state TEXT PRIMARY KEY, jobs INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO counts VALUES ('queued', 0), ('running', 0), ('completed', 0), ('failed', 0), ('cancelled', 0);
UPDATE counts SET jobs = (SELECT count(*) FROM jobs WHERE jobs.state = counts.state);

CREATE TABLE new_requests (job_id TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
INSERT INTO new_requests SELECT job_id, body FROM requests;
DROP TABLE requests;
ALTER TABLE new_requests RENAME TO requests;
