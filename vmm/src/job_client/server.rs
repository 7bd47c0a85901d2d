//! The other side: diptych or QEMU, whichever version.

use std::collections::{HashSet, VecDeque};
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::error::JobError;
use super::interrupt::{Interrupts, LastSignal};
use super::jobs::{self, Job};
use crate::client::{Client, ClientError, Event};

/// A connection, and the commands that are there.
#[derive(Debug)]
pub struct Server {
    client: Client<Interrupts>,
    commands: HashSet<String>,
    last_signal: LastSignal,
    /// As the user named it, for hints.
    address: String,
}

/// A node that the server has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
}

impl Server {
    /// Connects; each answer may take up to `patience`.
    pub fn connect(path: &Path, patience: Duration) -> Result<Self, JobError> {
        let interrupts = Interrupts::new().map_err(JobError::Signals)?;
        let last_signal = interrupts.last();
        let begin = || {
            let mut client = Client::connect(path, patience, interrupts)?;
            let list = client.execute("query-commands", json!({}))?;
            Ok((client, list))
        };
        let (client, list) = begin().map_err(|error| interrupted_or(&last_signal, error))?;
        let rows = list.as_array().ok_or(JobError::Answer {
            command: "query-commands",
        })?;
        let names = rows.iter().filter_map(|row| row["name"].as_str());
        Ok(Self {
            commands: names.map(str::to_owned).collect(),
            client,
            last_signal,
            address: format!("unix:{}", path.display()),
        })
    }

    /// The address of the socket.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Whether it has a command.
    pub fn has(&self, command: &str) -> bool {
        self.commands.contains(command)
    }

    /// Runs a command.
    ///
    /// Errors: it is not there, it is refused, the connection fails, a signal
    /// came.
    pub fn run(&mut self, command: &'static str, arguments: Value) -> Result<Value, JobError> {
        if !self.has(command) {
            return Err(JobError::NoCommand(vec![command]));
        }
        let result = self.client.execute(command, arguments);
        result.map_err(|error| interrupted_or(&self.last_signal, error))
    }

    /// The next event within `patience`.
    pub fn next_event(&mut self, patience: Duration) -> Result<Option<Event>, JobError> {
        let result = self.client.next_event(patience);
        result.map_err(|error| interrupted_or(&self.last_signal, error))
    }

    /// Forgets the events of jobs that had the id `id` before the one that has it now, if
    /// that has begun since the connection was made.
    pub fn forget_earlier(&mut self, id: &str) {
        forget_earlier(self.client.kept_events(), id);
    }

    /// What becomes of signals.
    pub fn interrupts(&mut self) -> &mut Interrupts {
        self.client.watch()
    }

    /// All jobs; as much about each as the server tells.
    pub fn jobs(&mut self) -> Result<Vec<Job>, JobError> {
        let mut all = if self.has("query-jobs") {
            let answer = self.run("query-jobs", json!({}))?;
            jobs::read_jobs(&answer).ok_or(JobError::Answer {
                command: "query-jobs",
            })?
        } else {
            Vec::new()
        };
        if self.has("query-block-jobs") {
            let answer = self.run("query-block-jobs", json!({}))?;
            jobs::add_block_jobs(&mut all, &answer).ok_or(JobError::Answer {
                command: "query-block-jobs",
            })?;
        }
        Ok(all)
    }

    /// All nodes.
    pub fn nodes(&mut self) -> Result<Vec<Node>, JobError> {
        let command = "query-named-block-nodes";
        let answer = self.run(command, json!({"flat": true}))?;
        let rows = answer.as_array().ok_or(JobError::Answer { command })?;
        Ok(rows.iter().filter_map(node).collect())
    }

    /// What is in the drive of a guest's disk, which is named by its device.
    pub fn disk(&mut self, name: &str) -> Result<Option<Node>, JobError> {
        if !self.has("query-block") {
            return Ok(None);
        }
        let answer = self.run("query-block", json!({}))?;
        let rows = answer.as_array().map(Vec::as_slice).unwrap_or_default();
        let disk = rows
            .iter()
            .find(|row| row["device"] == name || row["qdev"] == name);
        Ok(disk.and_then(|row| node(&row["inserted"])))
    }
}

fn forget_earlier(events: &mut VecDeque<Event>, id: &str) {
    let is_its = |event: &Event| event.data["id"] == id || event.data["device"] == id;
    let begins = |event: &Event| {
        event.name == "JOB_STATUS_CHANGE" && is_its(event) && event.data["status"] == "created"
    };
    let Some(begun) = events.iter().rposition(begins) else {
        return;
    };
    let mut place = 0..;
    events.retain(|event| place.next() >= Some(begun) || !is_its(event));
}

fn interrupted_or(last_signal: &LastSignal, error: ClientError) -> JobError {
    match error {
        ClientError::Stopped(_) => JobError::Interrupted {
            signal: last_signal.number(),
        },
        error => JobError::Client(error),
    }
}

fn node(row: &Value) -> Option<Node> {
    Some(Node {
        name: row["node-name"].as_str()?.to_owned(),
        size: row["image"]["virtual-size"].as_u64()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_earlier_job_of_the_same_id_does_not_end_a_later_one() {
        let event = |name: &str, data: Value| Event {
            name: name.to_owned(),
            data,
            timestamp: Value::Null,
        };
        let status = |id: &str, status: &str| {
            event("JOB_STATUS_CHANGE", json!({"id": id, "status": status}))
        };
        let all = [
            status("a", "concluded"),
            event("BLOCK_JOB_COMPLETED", json!({"device": "a"})),
            status("b", "running"),
            status("a", "null"),
            status("a", "created"),
            event("SHUTDOWN", json!({})),
            status("a", "running"),
        ];
        let mut events = VecDeque::from(all.clone());
        forget_earlier(&mut events, "a");
        let left = [2, 4, 5, 6].map(|index: usize| all[index].clone());
        assert_eq!(events, left);
        forget_earlier(&mut events, "b");
        assert_eq!(events, left, "it began before the connection");
    }
}
