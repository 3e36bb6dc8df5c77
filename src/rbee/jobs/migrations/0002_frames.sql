-- The rows of logs hold their events as frames of a stream, ready to be sent.
UPDATE log_rows SET body = frames_of_lines(body, last_seq);
UPDATE log_heads SET size_bytes =
    (SELECT coalesce(sum(length(body)), 0) FROM log_rows WHERE log_rows.log_id = log_heads.log_id);
