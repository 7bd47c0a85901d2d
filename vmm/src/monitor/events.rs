//! Events on their way out: name, data, and the time at which they happened.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jobs::{BlockJobProgress, JobEvent, JobEventKind};
use serde::Serialize;
use serde_json::{Value, json};

use super::json;

/// Something that happened, for every negotiated session.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Event {
    name: &'static str,
    data: Option<Value>,
    /// Since the epoch.
    time: Duration,
}

impl Event {
    /// An event of this moment. `name` is QMP's.
    pub(crate) fn now(name: &'static str, data: Option<Value>) -> Self {
        Self::at(SystemTime::now(), name, data)
    }

    fn at(time: SystemTime, name: &'static str, data: Option<Value>) -> Self {
        Self {
            name,
            data,
            // A clock before 1970 is shown as 1970.
            time: time.duration_since(UNIX_EPOCH).unwrap_or_default(),
        }
    }

    /// An event of a job. `device` of block jobs carries the job's id.
    pub(super) fn of_job(event: &JobEvent) -> Self {
        let id = event.id.as_str();
        let numbers = |progress: &BlockJobProgress| {
            json!({
                "type": event.job_type,
                "device": id,
                "len": progress.len,
                "offset": progress.offset,
                "speed": progress.speed,
            })
        };
        let (name, data) = match &event.kind {
            JobEventKind::StatusChange(status) => (
                "JOB_STATUS_CHANGE",
                json!({"id": id, "status": status.name()}),
            ),
            JobEventKind::Ready(progress) => ("BLOCK_JOB_READY", numbers(progress)),
            JobEventKind::Pending => (
                "BLOCK_JOB_PENDING",
                json!({"type": event.job_type, "id": id}),
            ),
            JobEventKind::Stalled { dirty, copy } => (
                "BLOCK_JOB_NOT_CONVERGING",
                json!({
                    "type": event.job_type,
                    "device": id,
                    "dirty-rate": dirty,
                    "copy-rate": copy,
                }),
            ),
            JobEventKind::Error { operation, action } => (
                "BLOCK_JOB_ERROR",
                json!({"device": id, "operation": operation.name(), "action": action.name()}),
            ),
            JobEventKind::Completed { progress, error } => {
                let mut data = numbers(progress);
                if let Some(error) = error {
                    data["error"] = Value::from(error.as_str());
                }
                ("BLOCK_JOB_COMPLETED", data)
            }
            JobEventKind::Cancelled(progress) => ("BLOCK_JOB_CANCELLED", numbers(progress)),
        };
        Self::at(event.time, name, Some(data))
    }

    /// An export has gone.
    pub(super) fn of_deleted_export(id: &str) -> Self {
        Self::now("BLOCK_EXPORT_DELETED", Some(json!({"id": id})))
    }

    /// As much was written to a node as its user wanted to know of.
    pub(super) fn of_write_threshold(node_name: &str, exceeded: u64, threshold: u64) -> Self {
        let data = json!({
            "node-name": node_name,
            "amount-exceeded": exceeded,
            "write-threshold": threshold,
        });
        Self::now("BLOCK_WRITE_THRESHOLD", Some(data))
    }

    /// The event as a line of QMP.
    pub(super) fn line(&self) -> Vec<u8> {
        #[derive(Serialize)]
        struct Timestamp {
            seconds: u64,
            microseconds: u32,
        }
        #[derive(Serialize)]
        struct Message<'a> {
            timestamp: Timestamp,
            event: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            data: Option<&'a Value>,
        }
        json::write_line(&Message {
            timestamp: Timestamp {
                seconds: self.time.as_secs(),
                microseconds: self.time.subsec_micros(),
            },
            event: self.name,
            data: self.data.as_ref(),
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    impl Event {
        /// Name and data.
        pub(in super::super) fn parts(&self) -> (&'static str, Option<&Value>) {
            (self.name, self.data.as_ref())
        }
    }

    #[test]
    fn an_event_without_data_has_no_data_member() {
        let event = Event {
            name: "STOP",
            data: None,
            time: Duration::new(5, 7_000),
        };
        assert_eq!(
            String::from_utf8(event.line()).unwrap(),
            "{\"timestamp\": {\"seconds\": 5, \"microseconds\": 7}, \"event\": \"STOP\"}\r\n"
        );
    }

    #[test]
    fn an_event_carries_its_data() {
        let event = Event {
            name: "RESET",
            data: Some(json!({"guest": true})),
            time: Duration::ZERO,
        };
        let line: Value = serde_json::from_slice(&event.line()).unwrap();
        assert_eq!(line["data"], json!({"guest": true}));
        assert_eq!(line["timestamp"], json!({"seconds": 0, "microseconds": 0}));
    }

    #[test]
    fn events_of_jobs_carry_what_qemus_carry() {
        let progress = BlockJobProgress {
            len: 10,
            offset: 5,
            speed: 7,
        };
        let numbers = json!({"type": "mirror", "device": "j0", "len": 10, "offset": 5, "speed": 7});
        let mut failed = numbers.clone();
        failed["error"] = json!("Input/output error");
        let cases = [
            (
                JobEventKind::StatusChange(jobs::JobStatus::Ready),
                "JOB_STATUS_CHANGE",
                json!({"id": "j0", "status": "ready"}),
            ),
            (
                JobEventKind::Ready(progress),
                "BLOCK_JOB_READY",
                numbers.clone(),
            ),
            (
                JobEventKind::Pending,
                "BLOCK_JOB_PENDING",
                json!({"type": "mirror", "id": "j0"}),
            ),
            (
                JobEventKind::Error {
                    operation: jobs::IoSide::Write,
                    action: jobs::ErrorAction::Stop,
                },
                "BLOCK_JOB_ERROR",
                json!({"device": "j0", "operation": "write", "action": "stop"}),
            ),
            (
                JobEventKind::Completed {
                    progress,
                    error: None,
                },
                "BLOCK_JOB_COMPLETED",
                numbers.clone(),
            ),
            (
                JobEventKind::Completed {
                    progress,
                    error: Some("Input/output error".to_owned()),
                },
                "BLOCK_JOB_COMPLETED",
                failed,
            ),
            (
                JobEventKind::Cancelled(progress),
                "BLOCK_JOB_CANCELLED",
                numbers,
            ),
        ];
        for (kind, name, data) in cases {
            let event = Event::of_job(&JobEvent {
                sequence: 1,
                time: UNIX_EPOCH + Duration::new(3, 4_000),
                id: jobs::JobId::new("j0").unwrap(),
                job_type: "mirror",
                kind,
            });
            assert_eq!(event.name, name);
            assert_eq!(event.data, Some(data));
            assert_eq!(event.time, Duration::new(3, 4_000));
        }
    }

    /// What jobs may announce, of each kind one.
    pub(in super::super) fn one_of_each_kind(progress: BlockJobProgress) -> Vec<JobEvent> {
        let kinds = [
            JobEventKind::StatusChange(jobs::JobStatus::Ready),
            JobEventKind::Ready(progress),
            JobEventKind::Pending,
            JobEventKind::Stalled { dirty: 1, copy: 2 },
            JobEventKind::Error {
                operation: jobs::IoSide::Write,
                action: jobs::ErrorAction::Stop,
            },
            JobEventKind::Completed {
                progress,
                error: Some("Input/output error".to_owned()),
            },
            JobEventKind::Cancelled(progress),
        ];
        for kind in &kinds {
            match kind {
                // Whoever adds a kind adds it above as well.
                JobEventKind::StatusChange(_)
                | JobEventKind::Ready(_)
                | JobEventKind::Pending
                | JobEventKind::Stalled { .. }
                | JobEventKind::Error { .. }
                | JobEventKind::Completed { .. }
                | JobEventKind::Cancelled(_) => (),
            }
        }
        let event = |kind| JobEvent {
            sequence: 1,
            time: UNIX_EPOCH,
            id: jobs::JobId::new("j0").unwrap(),
            job_type: "mirror",
            kind,
        };
        kinds.into_iter().map(event).collect()
    }
}
