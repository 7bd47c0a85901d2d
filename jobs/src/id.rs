//! Names of jobs: the id that clients choose and the key that this process
//! gives.

use std::fmt;
use std::sync::Arc;

use crate::error::JobError;

/// An id as clients see it: an ASCII letter, then letters, digits, `-`, `.`
/// and `_`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(Arc<str>);

impl JobId {
    /// Checks `id`.
    ///
    /// # Errors
    ///
    /// [`JobError::InvalidId`] if it is not well-formed.
    pub fn new(id: &str) -> Result<Self, JobError> {
        let mut bytes = id.bytes();
        let well_formed = bytes.next().is_some_and(|b| b.is_ascii_alphabetic())
            && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
        if well_formed {
            Ok(Self(id.into()))
        } else {
            Err(JobError::InvalidId { id: id.to_owned() })
        }
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names one job for as long as this process lives.
///
/// Unlike an id a key is never given again: who kept one across an unlock finds
/// its job or nothing, never another job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobKey(pub(crate) u64);

/// Names one job transaction: jobs that succeed or fail together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TxnKey(pub(crate) u64);

#[cfg(test)]
mod tests {
    use super::JobId;

    #[test]
    fn ids_begin_with_a_letter_and_go_on_with_letters_digits_and_three_signs() {
        for good in ["j0", "A-z_0.9", "z", "id0", "ID-0"] {
            assert_eq!(JobId::new(good).unwrap().as_str(), good);
        }
        for bad in [
            "",
            " ",
            "0bad",
            "has space",
            "a/b",
            "#x7",
            "-x",
            ".x",
            "_x",
            "ä",
            "a\0",
        ] {
            assert_eq!(
                JobId::new(bad).unwrap_err().to_string(),
                format!("Invalid job ID '{bad}'")
            );
        }
    }
}
