//! What is done to nodes in use: `block_resize`, `block-set-write-threshold`.

use std::rc::Rc;
use std::sync::{Mutex, PoisonError};

use block::GraphError;
use block::runtime::spawn_local;
use futures_channel::oneshot;

use super::{Outcome, bounded, done};
use crate::monitor::args::Args;
use crate::monitor::error::QmpError;
use crate::monitor::{Event, Monitor};

pub(super) async fn block_resize(monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    let device = args.optional_str("device")?;
    let node_name = args.optional_str("node-name")?;
    let size = args.required_i64("size")?;
    args.finish()?;
    let _alone = monitor.graph_commands.lock().await;
    let graph = &monitor.graph;
    let attached = device.as_deref().and_then(|name| graph.find_backend(name));
    let named = node_name.as_deref().map(|name| graph.find_node(name));
    let node = match (attached, named) {
        (Some(backend), _) => backend.root(),
        (None, Some(Ok(node))) => node,
        _ => {
            return Err(GraphError::NotFound {
                device: device.unwrap_or_default(),
                node: node_name.unwrap_or_default(),
            }
            .into());
        }
    };
    let size =
        u64::try_from(size).map_err(|_| QmpError::generic("Parameter 'size' expects a >0 size"))?;
    if graph.check_not_blocked(&node).is_err() {
        // QEMU's words, also for a node that no device is attached to.
        let device = device.as_deref().unwrap_or("(null)");
        return Err(QmpError::generic(format!("Device '{device}' is in use")));
    }
    let resized = bounded("Resizing the node", graph.resize(&node, size)).await;
    if let Some(machine) = monitor.machine() {
        machine.refresh_disks();
    }
    resized?.map_err(QmpError::from)?;
    done()
}

pub(super) async fn block_set_write_threshold(monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    let name = args.required_str("node-name")?;
    let threshold = args.optional_u64("write-threshold")?;
    let threshold = threshold.ok_or_else(|| QmpError::missing("write-threshold"))?;
    args.finish()?;
    let node = monitor
        .graph
        .find_node(&name)
        .map_err(|_| QmpError::generic(format!("Device '{name}' not found")))?;
    let (told, exceeded) = oneshot::channel();
    let told = Mutex::new(Some(told));
    node.set_write_threshold(threshold, move |bytes| {
        let told = told.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(told) = told {
            // The monitor may have ended.
            let _ = told.send(bytes);
        }
    });
    let monitor = Rc::downgrade(&monitor);
    spawn_local(async move {
        // Else another threshold was set, or the node is gone.
        if let (Ok(bytes), Some(monitor)) = (exceeded.await, monitor.upgrade()) {
            monitor.emit(&Event::of_write_threshold(&name, bytes, threshold));
        }
    })
    .detach();
    done()
}
