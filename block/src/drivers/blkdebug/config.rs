//! Files of rules: groups `[inject-error]` and `[set-state]` of lines
//! `key = "value"`, and comments.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use super::rules::{InjectError, SetState};
use super::{BlkdebugError, IO_TYPES};
use crate::debug_event::DebugEvent;

/// Larger files are no rules of anybody.
const MAX_FILE: u64 = 1 << 20;

/// Rules of a file, in its order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct ConfigRules {
    pub(super) errors: Vec<InjectError>,
    pub(super) states: Vec<SetState>,
}

/// Reads a file of rules. May block.
pub(super) fn read(path: &Path) -> Result<ConfigRules, BlkdebugError> {
    let file = OpenOptions::new()
        .read(true)
        // A FIFO without a writer does not hold us up.
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(BlkdebugError::OpenConfig)?;
    let mut content = Vec::new();
    file.take(MAX_FILE + 1)
        .read_to_end(&mut content)
        .map_err(BlkdebugError::ReadConfig)?;
    if content.len() as u64 > MAX_FILE {
        let error = io::Error::from_raw_os_error(libc::EFBIG);
        return Err(BlkdebugError::ReadConfig(error));
    }
    parse(std::str::from_utf8(&content).map_err(|_| BlkdebugError::Parse)?)
}

/// A group as it is being read: its keys and values.
struct Group {
    is_error: bool,
    members: Vec<(String, String)>,
}

pub(super) fn parse(text: &str) -> Result<ConfigRules, BlkdebugError> {
    let mut groups: Vec<Group> = Vec::new();
    for line in text.lines().map(str::trim) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(rest) = line.strip_prefix('[') {
            let name = rest.split([']', ' ']).next().unwrap_or_default();
            let is_error = match (name, rest.contains(']')) {
                ("inject-error", true) => true,
                ("set-state", true) => false,
                _ => return Err(BlkdebugError::NoSuchGroup(name.chars().take(63).collect())),
            };
            groups.push(Group {
                is_error,
                members: Vec::new(),
            });
            continue;
        }
        let Some(group) = groups.last_mut() else {
            return Err(BlkdebugError::NoGroup);
        };
        let member = line.split_once('=').and_then(|(key, value)| {
            let value = value.trim().strip_prefix('"')?;
            let (value, _comment) = value.split_once('"')?;
            Some((key.trim().to_owned(), value.to_owned()))
        });
        group.members.push(member.ok_or(BlkdebugError::Parse)?);
    }
    let mut rules = ConfigRules::default();
    for group in &groups {
        if group.is_error {
            rules.errors.push(group.inject_error()?);
        } else {
            rules.states.push(group.set_state()?);
        }
    }
    Ok(rules)
}

impl Group {
    /// The last value that was given.
    fn value(&self, name: &str) -> Option<&str> {
        self.members
            .iter()
            .rfind(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    fn number(&self, name: &'static str) -> Result<Option<i64>, BlkdebugError> {
        let Some(text) = self.value(name) else {
            return Ok(None);
        };
        let number = match text.strip_prefix("0x") {
            Some(hex) => i64::from_str_radix(hex, 16),
            None => text.parse(),
        };
        match number {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(BlkdebugError::NotANumber(name)),
        }
    }

    /// As QEMU keeps them: the lower half.
    fn int(&self, name: &'static str) -> Result<Option<i32>, BlkdebugError> {
        Ok(self.number(name)?.map(|number| number as i32))
    }

    fn flag(&self, name: &'static str) -> Result<bool, BlkdebugError> {
        match self.value(name) {
            None | Some("off" | "no" | "false" | "n") => Ok(false),
            Some("on" | "yes" | "true" | "y") => Ok(true),
            Some(_) => Err(BlkdebugError::NotAFlag(name)),
        }
    }

    fn event(&self) -> Result<DebugEvent, BlkdebugError> {
        let name = self.value("event").ok_or(BlkdebugError::NoEvent)?;
        DebugEvent::from_name(name).ok_or_else(|| BlkdebugError::BadValue(name.to_owned()))
    }

    fn check_names(&self, known: &[&str]) -> Result<(), BlkdebugError> {
        let unknown = self
            .members
            .iter()
            .find(|(key, _)| !known.contains(&key.as_str()));
        match unknown {
            Some((key, _)) => Err(BlkdebugError::UnknownKey(key.clone())),
            None => Ok(()),
        }
    }

    fn inject_error(&self) -> Result<InjectError, BlkdebugError> {
        self.check_names(&[
            "event",
            "state",
            "iotype",
            "errno",
            "sector",
            "once",
            "immediately",
            "delay-ns",
        ])?;
        let op = match self.value("iotype") {
            None => None,
            Some(name) => {
                let known = IO_TYPES.iter().find(|(known, _)| *known == name);
                let (_, op) = known.ok_or_else(|| BlkdebugError::BadValue(name.to_owned()))?;
                Some(*op)
            }
        };
        let delay = self.number("delay-ns")?.unwrap_or(0);
        Ok(InjectError {
            event: self.event()?,
            state: self.int("state")?.unwrap_or(0),
            op,
            errno: self.int("errno")?.unwrap_or(libc::EIO),
            sector: self.number("sector")?.and_then(InjectError::sector_from),
            once: self.flag("once")?,
            immediately: self.flag("immediately")?,
            delay: Duration::from_nanos(
                u64::try_from(delay).map_err(|_| BlkdebugError::NotANumber("delay-ns"))?,
            ),
        })
    }

    fn set_state(&self) -> Result<SetState, BlkdebugError> {
        self.check_names(&["event", "state", "new_state"])?;
        Ok(SetState {
            event: self.event()?,
            state: self.int("state")?.unwrap_or(0),
            new_state: self.int("new_state")?.unwrap_or(0),
        })
    }
}
