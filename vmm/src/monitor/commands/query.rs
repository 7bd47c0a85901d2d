//! What nodes and devices there are.

use std::rc::Rc;
use std::time::Duration;

use block::runtime::sleep;
use block::{DetectZeroes, ImageDetails, NodeInfo, Perm};
use futures_util::future::{Either, select};
use futures_util::pin_mut;
use serde_json::{Value, json};

use super::Outcome;
use crate::monitor::Monitor;
use crate::monitor::args::Args;

/// How long a query waits for what takes looking at files.
const LOOK: Duration = Duration::from_secs(1);

/// Newest first, as in QEMU.
pub(super) async fn query_named_block_nodes(monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    let flat = args.optional_bool("flat")?.unwrap_or(false);
    args.finish()?;
    let mut shown = Vec::new();
    for node in monitor.graph.nodes().iter().rev() {
        shown.push(block_device_info(&monitor, node, flat).await);
    }
    Ok(Value::from(shown))
}

/// Who uses which node, and with what rights.
pub(super) async fn query_block_graph(monitor: Rc<Monitor>, args: Args) -> Outcome {
    args.finish()?;
    let dump = monitor.graph.dump();
    let nodes = dump
        .nodes
        .iter()
        .rev()
        .map(|node| json!({"id": node.id, "type": node.kind, "name": node.name}));
    let edges = dump.edges.iter().rev().map(|edge| {
        json!({
            "parent": edge.parent,
            "child": edge.child,
            "name": edge.name,
            "perm": rights(edge.permissions.need),
            "shared-perm": rights(edge.permissions.share),
        })
    });
    Ok(json!({"nodes": nodes.collect::<Value>(), "edges": edges.collect::<Value>()}))
}

fn rights(set: Perm) -> Value {
    let names = [
        (Perm::RESIZE, "resize"),
        (Perm::WRITE_UNCHANGED, "write-unchanged"),
        (Perm::WRITE, "write"),
        (Perm::CONSISTENT_READ, "consistent-read"),
    ];
    names
        .iter()
        .filter(|(perm, _)| set.contains(*perm))
        .map(|(_, name)| Value::from(*name))
        .collect()
}

/// The devices of the guest, and what they show it.
pub(super) async fn query_block(monitor: Rc<Monitor>, args: Args) -> Outcome {
    args.finish()?;
    let Some(machine) = monitor.machine() else {
        return Ok(json!([]));
    };
    let mut devices = Vec::new();
    for disk in machine.disks() {
        let node = monitor.graph.find_backend(&disk.id).map(|b| b.root());
        let inserted = node.and_then(|node| monitor.graph.info(&node));
        let mut device = json!({
            "device": disk.id,
            "qdev": disk.qdev,
            "type": "unknown",
            "io-status": "ok",
            "locked": false,
            "removable": false,
        });
        if let Some(inserted) = inserted {
            device["inserted"] = block_device_info(&monitor, &inserted, false).await;
        }
        devices.push(device);
    }
    Ok(Value::from(devices))
}

/// An `ImageInfo`, without what is below.
async fn image_info(monitor: &Monitor, node: &NodeInfo) -> Value {
    let mut image = json!({
        "filename": node.filename,
        "format": node.driver,
        "virtual-size": node.size,
    });
    if let Some(cluster_size) = node.cluster_size {
        image["cluster-size"] = Value::from(cluster_size);
    }
    if node.has_details {
        let is_dirty = node.details.as_ref().is_some_and(|details| details.dirty);
        image["dirty-flag"] = Value::from(is_dirty);
    }
    if let Some(details) = &node.details {
        header_info(&mut image, details);
        if let Some(full) = &node.header_backing {
            image["full-backing-filename"] = Value::from(full.as_str());
        }
    }
    if let Ok(found) = monitor.graph.find_node(&node.name) {
        let size = monitor.graph.allocated_size(&found);
        let deadline = sleep(LOOK);
        pin_mut!(size, deadline);
        // A file server that is gone does not hold the monitor.
        if let Either::Left((Some(size), _)) = select(size, deadline).await {
            image["actual-size"] = Value::from(size);
        }
    }
    image
}

/// What the header of an image says.
fn header_info(image: &mut Value, details: &ImageDetails) {
    if let Some(name) = &details.backing_filename {
        image["backing-filename"] = Value::from(name.as_str());
    }
    if let Some(format) = &details.backing_format {
        image["backing-filename-format"] = Value::from(format.as_str());
    }
    let mut data = json!({
        "compat": if details.version >= 3 { "1.1" } else { "0.10" },
        "compression-type": "zlib",
        "refcount-bits": details.refcount_bits,
    });
    if details.version >= 3 {
        data["lazy-refcounts"] = Value::from(details.lazy_refcounts);
        data["corrupt"] = Value::from(details.corrupt);
        data["extended-l2"] = Value::from(false);
        if let Some(file) = &details.data_file {
            data["data-file"] = Value::from(file.as_str());
            data["data-file-raw"] = Value::from(details.data_file_raw);
        }
    }
    image["format-specific"] = json!({"type": "qcow2", "data": data});
}

/// The nodes below, down the chain: a filter's child, or the backing image.
fn below(monitor: &Monitor, node: &NodeInfo) -> Vec<NodeInfo> {
    let mut chain: Vec<NodeInfo> = Vec::new();
    let mut next = node.below.clone();
    while let Some(info) = next.and_then(|node| monitor.graph.info(&node)) {
        next = info.below.clone();
        chain.push(info);
    }
    chain
}

/// A `BlockDeviceInfo`; `flat` leaves out what is below. Limits on the rate of a
/// node are those of a filter's group, so they are all 0.
async fn block_device_info(monitor: &Monitor, node: &NodeInfo, flat: bool) -> Value {
    let mut chain = Vec::new();
    if !flat {
        chain = below(monitor, node);
    }
    let depth = chain.len();
    let mut backing = None;
    for layer in chain.iter().rev() {
        let mut image = image_info(monitor, layer).await;
        if let Some(below) = backing.take() {
            image["backing-image"] = below;
        }
        backing = Some(image);
    }
    let mut image = image_info(monitor, node).await;
    if let Some(backing) = backing {
        image["backing-image"] = backing;
    }
    let mut info = json!({
        "node-name": node.name,
        "drv": node.driver,
        "file": node.filename,
        "ro": node.read_only,
        "encrypted": false,
        "backing_file_depth": depth,
        "detect_zeroes": match node.detect_zeroes {
            DetectZeroes::Off => "off",
            DetectZeroes::On => "on",
            DetectZeroes::Unmap => "unmap",
        },
        "cache": {
            "writeback": true,
            "direct": node.cache.direct,
            "no-flush": node.cache.no_flush,
        },
        // A signed number to QEMU's clients.
        "write_threshold": node.write_threshold.cast_signed(),
        "bps": 0, "bps_rd": 0, "bps_wr": 0,
        "iops": 0, "iops_rd": 0, "iops_wr": 0,
        "image": image,
    });
    if let Some(filename) = &node.backing_filename {
        info["backing_file"] = Value::from(filename.as_str());
    }
    if !node.bitmaps.is_empty() {
        let bitmaps = node.bitmaps.iter().map(|bitmap| {
            let mut shown = json!({
                "recording": bitmap.recording,
                "busy": bitmap.busy,
                "persistent": bitmap.persistent,
                "granularity": bitmap.granularity,
                "count": bitmap.count,
            });
            if let Some(name) = &bitmap.name {
                shown["name"] = Value::from(name.as_str());
            }
            if bitmap.inconsistent {
                shown["inconsistent"] = Value::from(true);
            }
            shown
        });
        info["dirty-bitmaps"] = bitmaps.collect();
    }
    info
}
