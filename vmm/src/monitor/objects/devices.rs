//! The guest's disks as objects: `/machine/peripheral/ID`, and the path that
//! `query-block` shows as `qdev`.
//!
//! Their one property that can be set is `drive`, the node that the guest's requests
//! go to: so a filter such as `copy-before-write` is put over a disk and taken out
//! again while the guest runs.

use std::time::Duration;

use block::Graph;
use serde_json::{Value, json};

use super::super::error::QmpError;
use super::qom::{no_property, property_rows, read_only};
use crate::vm_control::{DiskInfo, VmControl};

/// The type of a disk.
pub(super) const TYPE: &str = "virtio-blk-device";

/// What holds the devices that have an id.
const CONTAINER: [&str; 2] = ["machine", "peripheral"];

/// How long the guest's requests may be held back for a change.
const DRAIN: Duration = Duration::from_secs(2);

/// What a path leads to here.
pub(in super::super) enum Found {
    /// What all else is in.
    Machine,
    /// What holds the devices.
    Container,
    /// A disk.
    Disk(DiskInfo),
}

/// Properties of a disk, and their types.
pub(super) fn properties() -> impl Iterator<Item = (&'static str, &'static str)> {
    [("drive", "str")].into_iter()
}

/// What a path leads to, if that is the machine, or something of it. A path without a
/// slash at its start is the end of one.
pub(in super::super) fn find(machine: &dyn VmControl, path: &str) -> Option<Found> {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let leads_to = |whole: &[&str]| match path.starts_with('/') {
        true => parts == whole,
        false => !parts.is_empty() && whole.ends_with(&parts),
    };
    if leads_to(&CONTAINER[..1]) {
        return Some(Found::Machine);
    }
    if leads_to(&CONTAINER) {
        return Some(Found::Container);
    }
    let mut disks = machine.disks().into_iter().filter(|disk| {
        let by_id = [CONTAINER[0], CONTAINER[1], &disk.id];
        let qdev: Vec<&str> = disk
            .qdev
            .split('/')
            .filter(|part| !part.is_empty())
            .collect();
        leads_to(&by_id) || leads_to(&qdev)
    });
    match (disks.next(), disks.next()) {
        (Some(disk), None) => Some(Found::Disk(disk)),
        _ => None,
    }
}

impl Found {
    fn type_name(&self) -> &'static str {
        match self {
            Self::Machine | Self::Container => "container",
            Self::Disk(_) => TYPE,
        }
    }

    /// `qom-get`.
    pub(in super::super) fn property(
        &self,
        machine: &dyn VmControl,
        graph: &Graph,
        name: &str,
    ) -> Result<Value, QmpError> {
        let value = match (self, name) {
            (_, "type") => Some(self.type_name().into()),
            (Self::Machine, name) if name == CONTAINER[1] => {
                Some(format!("/{}", CONTAINER.join("/")).into())
            }
            (Self::Container, id) => machine
                .disks()
                .iter()
                .find(|disk| disk.id == id)
                .map(|disk| format!("/{}/{}", CONTAINER.join("/"), disk.id).into()),
            (Self::Disk(disk), "drive") => graph
                .find_backend(&disk.id)
                .map(|backend| backend.root().name().into()),
            _ => None,
        };
        value.ok_or_else(|| no_property(self.type_name(), name))
    }

    /// `qom-set`. `drive` moves a disk to the node of that name, in a drained section.
    ///
    /// Errors: it is not there or not writable; as [`Graph::move_backend`]; requests
    /// that do not end within [`DRAIN`]. Cancel: nothing has changed.
    pub(in super::super) async fn set_property(
        &self,
        machine: &dyn VmControl,
        graph: &Graph,
        name: &str,
        value: Value,
    ) -> Result<(), QmpError> {
        let (Self::Disk(disk), "drive") = (self, name) else {
            self.property(machine, graph, name)?;
            return Err(read_only(self.type_name(), name));
        };
        let Value::String(node) = value else {
            return Err(QmpError::wrong_type("drive", "string"));
        };
        let node = graph.find_node(&node)?;
        let backend = graph
            .find_backend(&disk.id)
            .ok_or_else(|| no_property(TYPE, name))?;
        let drained = graph.drain_within(&backend.root(), &[], DRAIN).await?;
        graph.move_backend(&backend, &node, &drained)?;
        tracing::info!(
            disk = disk.id,
            node = backend.root().name(),
            held_us = drained.elapsed().as_micros() as u64,
            "the disk stands on another node"
        );
        Ok(())
    }

    /// `qom-list`.
    pub(in super::super) fn list(&self, machine: &dyn VmControl) -> Value {
        match self {
            Self::Machine => {
                property_rows([(CONTAINER[1], "child<container>")].into_iter()).collect()
            }
            Self::Container => {
                let disks = machine.disks().into_iter();
                let children =
                    disks.map(|disk| json!({"name": disk.id, "type": format!("child<{TYPE}>")}));
                property_rows(std::iter::empty()).chain(children).collect()
            }
            Self::Disk(_) => property_rows(properties()).collect(),
        }
    }
}
