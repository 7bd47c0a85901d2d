//! Who a mirror is to the node that its target is to replace. The job's other
//! attachments are the job core's, and that of its filter is every copying job's.

use block::{AttachmentKind, BackendUser};

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
