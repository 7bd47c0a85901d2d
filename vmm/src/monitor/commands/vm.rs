//! The guest's machine: state, stop, go on, start again.

use std::rc::Rc;

use serde_json::{Value, json};

use super::{Outcome, bounded, done};
use crate::monitor::Monitor;
use crate::monitor::args::Args;
use crate::monitor::error::{ErrorClass, QmpError};
use crate::vm_control::{VmControl, VmError};

/// The machine; the table lets these commands through only where there is one.
fn machine(monitor: &Monitor) -> Result<Rc<dyn VmControl>, QmpError> {
    monitor
        .machine()
        .ok_or_else(|| QmpError::generic("There is no guest"))
}

fn refused(error: &VmError) -> QmpError {
    QmpError::with_causes(ErrorClass::Generic, error)
}

pub(super) async fn query_status(monitor: Rc<Monitor>, args: Args) -> Outcome {
    args.finish()?;
    let state = machine(&monitor)?.run_state();
    Ok(json!({
        "running": state.is_running(),
        "singlestep": false,
        "status": state.as_str(),
    }))
}

/// A guest has no name of its own yet.
pub(super) async fn query_name(_monitor: Rc<Monitor>, args: Args) -> Outcome {
    args.finish()?;
    Ok(json!({}))
}

pub(super) async fn query_iothreads(monitor: Rc<Monitor>, args: Args) -> Outcome {
    args.finish()?;
    let iothreads = machine(&monitor)?.iothreads();
    Ok(iothreads
        .iter()
        .map(|iothread| {
            json!({
                "id": iothread.id,
                "thread-id": iothread.thread_id,
                "poll-max-ns": 0,
                "poll-grow": 0,
                "poll-shrink": 0,
                "aio-max-batch": 0,
            })
        })
        .collect::<Value>())
}

pub(super) async fn stop(monitor: Rc<Monitor>, args: Args) -> Outcome {
    args.finish()?;
    let machine = machine(&monitor)?;
    bounded("Stopping the guest", machine.stop())
        .await?
        .map_err(|error| refused(&error))?;
    done()
}

pub(super) async fn cont(monitor: Rc<Monitor>, args: Args) -> Outcome {
    args.finish()?;
    let machine = machine(&monitor)?;
    bounded("Letting the guest go on", machine.cont())
        .await?
        .map_err(|error| refused(&error))?;
    done()
}

pub(super) async fn system_reset(monitor: Rc<Monitor>, args: Args) -> Outcome {
    args.finish()?;
    let machine = machine(&monitor)?;
    bounded("Resetting the guest", machine.system_reset())
        .await?
        .map_err(|error| refused(&error))?;
    done()
}

/// There is none. Backup tools ask, since what a TPM keeps is on no disk.
pub(super) async fn query_tpm(_monitor: Rc<Monitor>, args: Args) -> Outcome {
    args.finish()?;
    Ok(json!([]))
}
