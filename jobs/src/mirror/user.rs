//! Who the mirror's filter is to the graph. The job's other attachments are the
//! job core's.

use block::{AttachmentKind, BackendUser};

/// Keeps others from using the filter node. It has no requests of its own, and is
/// not told of drained sections: the job hears of them at source and target.
pub(super) struct FilterHold {
    pub(super) job_id: String,
}

impl BackendUser for FilterHold {
    fn holds_requests(&self) -> bool {
        false
    }

    fn kind(&self) -> AttachmentKind {
        AttachmentKind::Job
    }

    fn blocker(&self) -> Option<String> {
        Some("block device is in use by block job: mirror".to_owned())
    }

    fn describe(&self) -> String {
        format!("filter of mirror job '{}'", self.job_id)
    }
}

/// Keeps the node in the graph that the target is to replace. It has no requests of its
/// own. Other jobs cannot use the node in any case: other nodes stand on it.
pub(super) struct ReplacesHold {
    pub(super) job_id: String,
}

impl BackendUser for ReplacesHold {
    fn holds_requests(&self) -> bool {
        false
    }

    fn kind(&self) -> AttachmentKind {
        AttachmentKind::Job
    }

    fn describe(&self) -> String {
        format!("mirror job '{}'", self.job_id)
    }
}
