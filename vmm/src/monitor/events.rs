//! Events on their way out: name, data, and the time at which they happened.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::Value;

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
        Self {
            name,
            data,
            // A clock before 1970 is shown as 1970.
            time: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default(),
        }
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
mod tests {
    use serde_json::json;

    use super::*;

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
}
