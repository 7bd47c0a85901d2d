//! What nodes and devices there are.

use std::rc::Rc;

use block::{DetectZeroes, NodeInfo};
use serde_json::{Value, json};

use super::Outcome;
use crate::monitor::Monitor;
use crate::monitor::args::Args;

/// Newest first, as in QEMU. No format here has backing images of its own, so
/// `flat` changes nothing.
pub(super) async fn query_named_block_nodes(monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    args.optional_bool("flat")?;
    args.finish()?;
    let nodes = monitor.graph.nodes();
    Ok(nodes.iter().rev().map(block_device_info).collect())
}

/// The devices of the guest, and what they show it.
pub(super) async fn query_block(monitor: Rc<Monitor>, args: Args) -> Outcome {
    args.finish()?;
    let Some(machine) = monitor.machine() else {
        return Ok(json!([]));
    };
    let devices = machine.disks().into_iter().map(|disk| {
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
            device["inserted"] = block_device_info(&inserted);
        }
        device
    });
    Ok(devices.collect())
}

/// A `BlockDeviceInfo`. Limits on the rate of a node do not exist here, so they
/// are all 0.
fn block_device_info(node: &NodeInfo) -> Value {
    let mut image = json!({
        "filename": node.filename,
        "format": node.driver,
        "virtual-size": node.size,
    });
    if let Some(cluster_size) = node.cluster_size {
        image["cluster-size"] = Value::from(cluster_size);
    }
    let mut info = json!({
        "node-name": node.name,
        "drv": node.driver,
        "file": node.filename,
        "ro": node.read_only,
        "encrypted": false,
        "backing_file_depth": node.backing_depth,
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
        "write_threshold": 0,
        "bps": 0, "bps_rd": 0, "bps_wr": 0,
        "iops": 0, "iops_rd": 0, "iops_wr": 0,
        "image": image,
    });
    if !node.bitmaps.is_empty() {
        let bitmaps = node.bitmaps.iter().map(|bitmap| {
            json!({
                "recording": true,
                "busy": false,
                "persistent": false,
                "granularity": bitmap.granularity,
                "count": bitmap.count,
            })
        });
        info["dirty-bitmaps"] = bitmaps.collect();
    }
    info
}
