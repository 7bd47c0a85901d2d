//! What a server says about its jobs: `query-jobs` has all of them,
//! `query-block-jobs` more about most.

use serde_json::Value;

/// A job at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Job {
    /// Its id.
    pub id: String,
    /// `mirror`, `backup`, …
    pub kind: String,
    /// `running`, `ready`, …
    pub status: String,
    /// Work done, in bytes for block jobs.
    pub current: u64,
    /// `current` and what is known to be left.
    pub total: u64,
    /// Why it failed.
    pub error: Option<String>,
    /// Limit in bytes per second; 0 is none.
    pub speed: u64,
    /// `ok`, `nospace` or `failed`.
    pub io_status: Option<String>,
    /// Nobody has to finalize it.
    pub auto_finalize: Option<bool>,
    /// It leaves the list by itself when it has ended.
    pub auto_dismiss: Option<bool>,
    /// Bytes per second that the guest makes dirty.
    pub dirty_rate: Option<u64>,
    /// Everything that was said, for programs.
    pub raw: Value,
}

impl Job {
    /// It was stopped by an error of an image, and waits for the user.
    pub fn stopped_by(&self) -> Option<&str> {
        let stopped = matches!(self.status.as_str(), "paused" | "standby");
        let status = self.io_status.as_deref().filter(|status| *status != "ok");
        status.filter(|_| stopped)
    }
}

/// Reads the answer to `query-jobs`; `None` if it is no list.
pub fn read_jobs(answer: &Value) -> Option<Vec<Job>> {
    let rows = answer.as_array()?.iter().filter_map(|row| {
        Some(Job {
            id: row["id"].as_str()?.to_owned(),
            kind: text(row, "type").unwrap_or_default(),
            status: text(row, "status").unwrap_or_default(),
            current: number(row, "current-progress"),
            total: number(row, "total-progress"),
            error: text(row, "error"),
            raw: row.clone(),
            ..Job::default()
        })
    });
    Some(rows.collect())
}

/// Adds what `query-block-jobs` says; `None` if it is no list.
pub fn add_block_jobs(jobs: &mut Vec<Job>, answer: &Value) -> Option<()> {
    for row in answer.as_array()? {
        let Some(id) = row["device"].as_str() else {
            continue;
        };
        // One that has begun since the first answer, or a server that knows
        // block jobs only.
        let index = jobs.iter().position(|job| job.id == id);
        let index = index.unwrap_or_else(|| {
            jobs.push(Job {
                id: id.to_owned(),
                kind: text(row, "type").unwrap_or_default(),
                status: text(row, "status").unwrap_or_default(),
                current: number(row, "offset"),
                total: number(row, "len"),
                ..Job::default()
            });
            jobs.len() - 1
        });
        let Some(job) = jobs.get_mut(index) else {
            continue;
        };
        job.speed = number(row, "speed");
        job.io_status = text(row, "io-status");
        job.auto_finalize = row["auto-finalize"].as_bool();
        job.auto_dismiss = row["auto-dismiss"].as_bool();
        job.dirty_rate = row["dirty-rate"].as_u64();
        if let (Value::Object(all), Value::Object(more)) = (&mut job.raw, row) {
            all.extend(more.clone());
        } else {
            job.raw = row.clone();
        }
    }
    Some(())
}

fn text(row: &Value, name: &str) -> Option<String> {
    row[name].as_str().map(str::to_owned)
}

fn number(row: &Value, name: &str) -> u64 {
    row[name].as_u64().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn both_answers_make_one_job() {
        let mut jobs = read_jobs(&json!([
            {"id": "a", "type": "mirror", "status": "running", "current-progress": 5,
             "total-progress": 9},
            {"id": "c", "type": "create", "status": "concluded", "current-progress": 0,
             "total-progress": 0, "error": "No"},
        ]))
        .unwrap();
        add_block_jobs(
            &mut jobs,
            &json!([
                {"device": "a", "type": "mirror", "speed": 7, "io-status": "ok",
                 "auto-dismiss": false, "dirty-rate": 3},
                {"device": "b", "type": "backup", "status": "created", "offset": 1, "len": 2},
            ]),
        )
        .unwrap();
        assert_eq!(jobs.len(), 3);
        assert_eq!((jobs[0].current, jobs[0].speed), (5, 7));
        assert_eq!(jobs[0].auto_dismiss, Some(false));
        assert_eq!(jobs[0].dirty_rate, Some(3));
        assert_eq!(jobs[0].raw["total-progress"], 9);
        assert_eq!(jobs[0].raw["speed"], 7);
        assert_eq!(jobs[1].error.as_deref(), Some("No"));
        assert_eq!((jobs[2].id.as_str(), jobs[2].total), ("b", 2));
    }

    #[test]
    fn nonsense_is_no_job() {
        assert_eq!(read_jobs(&json!({})), None);
        assert_eq!(read_jobs(&json!([1, {"id": 3}, null])), Some(vec![]));
        let mut jobs = Vec::new();
        assert_eq!(add_block_jobs(&mut jobs, &json!("x")), None);
        assert_eq!(add_block_jobs(&mut jobs, &json!([{}, []])), Some(()));
        assert_eq!(jobs, []);
        let jobs = read_jobs(&json!([{"id": "a", "current-progress": -1}])).unwrap();
        assert_eq!(jobs[0].current, 0);
    }
}
