//! What a refused command answers: a class and a text.

use serde::{Serialize, Serializer};

/// QMP's error classes. Clients act on these, never on the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ErrorClass {
    /// Everything without a class of its own.
    Generic,
    /// Unknown here, or not before (or after) the negotiation.
    CommandNotFound,
    /// `block-job-*` on a job that does not exist.
    DeviceNotActive,
    /// No object at a path.
    DeviceNotFound,
}

impl ErrorClass {
    fn as_str(self) -> &'static str {
        match self {
            Self::Generic => "GenericError",
            Self::CommandNotFound => "CommandNotFound",
            Self::DeviceNotActive => "DeviceNotActive",
            Self::DeviceNotFound => "DeviceNotFound",
        }
    }
}

impl Serialize for ErrorClass {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// A refused command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{desc}")]
pub(crate) struct QmpError {
    /// For programs.
    pub(crate) class: ErrorClass,
    /// For people.
    pub(crate) desc: String,
}

impl QmpError {
    /// A `GenericError` with this text.
    pub(crate) fn generic(desc: impl Into<String>) -> Self {
        Self {
            class: ErrorClass::Generic,
            desc: desc.into(),
        }
    }

    /// The text of an error and, on the same line, of its causes.
    pub(crate) fn with_causes(class: ErrorClass, error: &dyn std::error::Error) -> Self {
        let mut desc = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            desc.push_str(": ");
            desc.push_str(&error.to_string());
            cause = error.source();
        }
        Self { class, desc }
    }

    /// No such command.
    pub(crate) fn not_found(command: &str) -> Self {
        Self {
            class: ErrorClass::CommandNotFound,
            desc: format!("The command {command} has not been found"),
        }
    }

    /// No object or type; `what` names it.
    pub(super) fn device_not_found(what: &str) -> Self {
        Self {
            class: ErrorClass::DeviceNotFound,
            desc: format!("{what} not found"),
        }
    }

    pub(crate) fn missing(path: &str) -> Self {
        Self::generic(format!("Parameter '{path}' is missing"))
    }

    pub(super) fn wrong_type(path: &str, expected: &str) -> Self {
        Self::generic(format!(
            "Invalid parameter type for '{path}', expected: {expected}"
        ))
    }

    /// `name` without its path, as QEMU's texts have it.
    pub(super) fn bad_value(name: &str, value: &str) -> Self {
        Self::generic(format!(
            "Parameter '{name}' does not accept value '{value}'"
        ))
    }

    /// `Parameter 'name' expects …`.
    pub(super) fn expects(path: &str, what: &str) -> Self {
        Self::generic(format!("Parameter '{path}' expects {what}"))
    }
}

impl From<block::GraphError> for QmpError {
    /// The graph's texts are QEMU's already; their causes are part of them.
    fn from(error: block::GraphError) -> Self {
        Self::generic(error.to_string())
    }
}

impl From<block::NamedBitmapError> for QmpError {
    /// The texts of bitmaps are QEMU's already; their causes are part of them.
    fn from(error: block::NamedBitmapError) -> Self {
        Self::generic(error.to_string())
    }
}

impl From<block::ExportError> for QmpError {
    /// The texts of exports are QEMU's already; their causes are part of them.
    fn from(error: block::ExportError) -> Self {
        Self::generic(error.to_string())
    }
}

impl From<jobs::JobError> for QmpError {
    /// The job core's texts are QEMU's already.
    fn from(error: jobs::JobError) -> Self {
        Self {
            class: match error.class() {
                jobs::ErrorClass::Generic => ErrorClass::Generic,
                jobs::ErrorClass::DeviceNotActive => ErrorClass::DeviceNotActive,
            },
            desc: error.to_string(),
        }
    }
}
