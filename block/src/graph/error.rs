//! Why the graph refuses something.
//!
//! Texts that QEMU's clients know are QEMU's, word for word: scripts match them.

use std::time::Duration;

use crate::bitmaps::{KeptError, NamedBitmapError};
use crate::drivers::{OpenError, ReopenError};
use crate::error::IoError;
use crate::permissions::{Perm, PermissionError};

/// A backend that a drained section waited for in vain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BusyBackend {
    /// Who it is.
    pub user: String,
    /// Requests in flight.
    pub in_flight: usize,
    /// Whether its user said that it is busy.
    pub user_busy: bool,
}

/// A refused or failed operation on the graph. Nothing has been changed.
#[derive(Debug, thiserror::Error)]
pub enum GraphError {
    /// `blockdev-add` of a node that nobody could name.
    #[error("'node-name' must be specified for the root node")]
    NodeNameRequired,
    /// A node name that is no identifier.
    #[error("Invalid node-name: '{0}'")]
    InvalidNodeName(String),
    /// A node name of more than 31 bytes.
    #[error("Node name too long")]
    NodeNameTooLong,
    /// There is a node of that name.
    #[error("Duplicate nodes with node-name='{0}'")]
    DuplicateNodeName(String),
    /// There is a device of the name that a node is to have.
    #[error("node-name={0} is conflicting with a device id")]
    NodeNameIsDevice(String),
    /// A device name that is no identifier.
    #[error("Invalid device name")]
    InvalidDeviceName,
    /// There is a device of that name.
    #[error("Device with id '{0}' already exists")]
    DuplicateDevice(String),
    /// There is a node of the name that a device is to have.
    #[error("Device name '{0}' conflicts with an existing node name")]
    DeviceNameIsNode(String),
    /// Neither a device nor a node of the given name.
    #[error("Cannot find device='{device}' nor node-name='{node}'")]
    NotFound {
        /// Device name that was looked for; empty if none.
        device: String,
        /// Node name that was looked for; empty if none.
        node: String,
    },
    /// `blockdev-del` of a node that is not there.
    #[error("Failed to find node with node-name='{0}'")]
    NoSuchNode(String),
    /// A device, export or job is attached to the node.
    #[error("Node {0} is in use")]
    NodeInUse(String),
    /// Other nodes stand on the node.
    #[error("Block device {0} is in use")]
    HasParents(String),
    /// Someone forbids to touch the node.
    #[error("Node '{node}' is busy: {reason}")]
    Blocked {
        /// Name of the node.
        node: String,
        /// See [`BackendUser::blocker`](crate::BackendUser::blocker).
        reason: String,
    },
    /// The node belongs to another node or to a job.
    #[error("Node {0} is not owned by the monitor")]
    NotMonitorOwned(String),
    /// Other nodes stand on a node that should be at the top.
    #[error("Need a root block node")]
    NotRootNode,
    /// Two users of a node do not go together.
    #[error(
        "Permission conflict on node '{node}': permissions '{perms}' are both required by \
         {required_by} (uses node '{node}' as '{required_as}' child) and unshared by \
         {unshared_by} (uses node '{node}' as '{unshared_as}' child)."
    )]
    Conflict {
        /// Name of the node.
        node: String,
        /// What one needs and the other forbids.
        perms: Perm,
        /// Who needs it.
        required_by: String,
        /// As what: `file`, `root`, …
        required_as: &'static str,
        /// Who forbids it.
        unshared_by: String,
        /// As what.
        unshared_as: &'static str,
    },
    /// The node or its image cannot have what its users need.
    #[error(transparent)]
    Permission(#[from] PermissionError),
    /// `detect-zeroes` says unmap and `discard` does not.
    #[error(
        "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
    )]
    DetectZeroesUnmap,
    /// A driver could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The `bottom` of a copy-on-read filter is not there.
    #[error("Bottom node '{0}' not found")]
    NoBottom(String),
    /// The `bottom` of a copy-on-read filter is no layer of its image.
    #[error("Bottom node '{bottom}' is not in the backing chain of node '{file}'")]
    BottomElsewhere {
        /// Name of the node.
        bottom: String,
        /// Name of the image's node.
        file: String,
    },
    /// A throttle filter's group is not there.
    #[error("Throttle group '{0}' does not exist")]
    NoSuchThrottleGroup(String),
    /// The backing image could not be opened.
    #[error("Could not open backing file: {0}")]
    Backing(Box<GraphError>),
    /// `blockdev-reopen` without a node's name.
    #[error("node-name not specified")]
    NodeNameNotSpecified,
    /// An open node cannot have the options that it is to be reopened with.
    #[error(transparent)]
    Reopen(#[from] ReopenError),
    /// A node that others write is to become read-only.
    #[error("Read-only block node '{0}' cannot support read-write users")]
    Writers(String),
    /// `blockdev-reopen` does not say what backing image a node is to have.
    #[error("backing is missing for '{0}'")]
    BackingMissing(String),
    /// Somebody changed the graph while a node was being reopened.
    #[error("The children of node '{0}' have changed while it was being reopened; try again")]
    ChangedMeanwhile(String),
    /// A reopened node would have another size than its users were promised.
    #[error(
        "Cannot change node '{node}' from {old} to {new} bytes: its users do not share 'resize' \
         on it"
    )]
    FixedSize {
        /// Name of the node.
        node: String,
        /// Its size in bytes.
        old: u64,
        /// The size that it would have.
        new: u64,
    },
    /// The change would make a node its own child.
    #[error("Making '{child}' a {role} child of '{parent}' would create a cycle")]
    Loop {
        /// Node that would be below.
        child: String,
        /// Its role there.
        role: &'static str,
        /// Node that would be above.
        parent: String,
    },
    /// A reopen would change what a node relies on that is to stay.
    #[error("Cannot change frozen '{role}' link from '{parent}' to '{child}'")]
    FrozenLink {
        /// As what the child is used.
        role: &'static str,
        /// Name of the node above.
        parent: String,
        /// Name of the node below.
        child: String,
    },
    /// A filter cannot be put in where a node relies on what is below.
    #[error("Cannot change '{role}' link to '{child}'")]
    FrozenAbove {
        /// As what the child is used.
        role: &'static str,
        /// Name of the node that the filter would be above.
        child: String,
    },
    /// A new node relies on a link that another relies on already.
    #[error("Cannot change '{role}' link from '{parent}' to '{child}'")]
    FrozenTwice {
        /// As what the child is used.
        role: &'static str,
        /// Name of the node above.
        parent: String,
        /// Name of the node below.
        child: String,
    },
    /// More nodes on one another than requests can pass.
    #[error(
        "Node '{0}' would be under more than {max} others; merge some of the images above it",
        max = super::topology::MAX_DEPTH - 1
    )]
    TooDeep(String),
    /// A replacement of another size, which a device would see.
    #[error(
        "Cannot replace node '{old}' of {old_size} bytes by '{new}' of {new_size} bytes: a device \
         or export would see its size change"
    )]
    SizeMismatch {
        /// Node to be replaced.
        old: String,
        /// Its size in bytes.
        old_size: u64,
        /// Its replacement.
        new: String,
        /// Size of that in bytes.
        new_size: u64,
    },
    /// The change needs a drained section that holds more than the one given.
    #[error("Cannot change the graph at node '{node}': {backend} is not drained")]
    NotDrained {
        /// Node where the change is.
        node: String,
        /// Who could send requests meanwhile.
        backend: String,
    },
    /// A device would leave a job's filter, which must see what it writes.
    #[error(
        "Cannot move {user} to node '{node}', away from filter '{filter}' of a block job, which \
         would miss its writes: wait until the job has ended, or cancel it"
    )]
    LeavesFilter {
        /// The device.
        user: String,
        /// The filter's node.
        filter: String,
        /// The node that it was to be moved to.
        node: String,
    },
    /// A user would begin to write below a job's filter.
    #[error(
        "Cannot let {user} write node '{node}' below filter '{filter}' of a block job, which would \
         miss the writes: attach it to '{filter}', or wait until the job has ended"
    )]
    BelowFilter {
        /// Who would write.
        user: String,
        /// The node it is attached to.
        node: String,
        /// The topmost filter over it.
        filter: String,
    },
    /// The node is no filter.
    #[error("Node '{0}' is not a filter")]
    NotFilter(String),
    /// A drained section could not begin in time; requests go on.
    #[error(
        "Requests did not finish within {} ms{}: {}. Check the storage behind them, then try again",
        .waited.as_millis(),
        describe_patience(*.for_others),
        describe_busy(.busy)
    )]
    DrainTimeout {
        /// How long it waited.
        waited: Duration,
        /// It would have waited longer, but for the guests of a backup whose writes are saved
        /// there first.
        for_others: bool,
        /// For whom.
        busy: Vec<BusyBackend>,
    },
    /// What was written could not be made durable in time, while requests were held; they
    /// go on.
    #[error(
        "Flushing took more than {:.1} s while requests were held. Check the storage, then try again",
        .0.as_secs_f64()
    )]
    FlushTimeout(Duration),
    /// A size past what any node can have.
    #[error("offset({0}) exceeds maximum(9223372035781033984)")]
    TooLarge(u64),
    /// An image whose first level table cannot map so large a disk.
    #[error("Failed to grow the L1 table: File too large")]
    NoLargerL1,
    /// The storage does not do it.
    #[error("Could not resize file: {}", .0.cause())]
    Resize(IoError),
    /// Resizing a read-only node.
    #[error("Image is read-only")]
    ImageReadOnly,
    /// Resizing a window of fixed size.
    #[error("Cannot resize fixed-size raw disks")]
    FixedRaw,
    /// Resizing what has no size of its own.
    #[error("Image format driver does not support resize")]
    NoResize,
    /// Resizing an image to what is not of whole sectors.
    #[error("The new size must be a multiple of 512")]
    UnalignedSize,
    /// A bitmap cannot be resized with its node.
    #[error(transparent)]
    Bitmap(#[from] NamedBitmapError),
    /// Persistent bitmaps cannot be kept, or had from their file.
    #[error(transparent)]
    Kept(#[from] KeptError),
    /// The storage cannot be resized, or not to that size.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The main loop has ended, so there is no graph any more.
    #[error("The main loop has ended")]
    MainGone,
}

fn describe_patience(for_others: bool) -> &'static str {
    match for_others {
        true => ", and guests whose writes are saved there first are held no longer",
        false => "",
    }
}

fn describe_busy(busy: &[BusyBackend]) -> String {
    busy.iter()
        .map(|b| {
            let own = if b.user_busy {
                ", its owner is busy"
            } else {
                ""
            };
            format!("{} has {} in flight{own}", b.user, b.in_flight)
        })
        .collect::<Vec<_>>()
        .join("; ")
}
