//! `object-add`, `object-del`, and properties of objects by path.

use std::rc::Rc;

use super::{Outcome, done};
use crate::monitor::Monitor;
use crate::monitor::args::Args;
use crate::monitor::error::QmpError;
use crate::monitor::objects::{Device, find_device, object_options, type_names, type_properties};
use crate::vm_control::VmControl;

pub(super) async fn object_add(monitor: Rc<Monitor>, args: Args) -> Outcome {
    let options = object_options(args)?;
    let _alone = monitor.graph_commands.lock().await;
    monitor.objects.add(options)?;
    done()
}

pub(super) async fn object_del(monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    let id = args.required_str("id")?;
    args.finish()?;
    let _alone = monitor.graph_commands.lock().await;
    monitor.objects.del(&id).await?;
    done()
}

/// Something of the machine, and the machine.
type OfMachine = (Rc<dyn VmControl>, Device);

/// What of the machine a path leads to. An end of two paths leads nowhere.
fn device(monitor: &Monitor, path: &str) -> Result<Option<OfMachine>, QmpError> {
    let Some(machine) = monitor.machine() else {
        return Ok(None);
    };
    let Some(device) = find_device(&*machine, path) else {
        return Ok(None);
    };
    match monitor.objects.has(path) {
        true => Err(QmpError::device_not_found(&format!("Device '{path}'"))),
        false => Ok(Some((machine, device))),
    }
}

pub(super) async fn qom_get(monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    let path = args.required_str("path")?;
    let property = args.required_str("property")?;
    args.finish()?;
    match device(&monitor, &path)? {
        Some((machine, device)) => device.property(&*machine, &monitor.graph, &property),
        None => monitor.objects.property(&path, &property),
    }
}

/// Does not wait for commands that change the graph: a limit may be what they
/// wait for, and a disk is moved in one step.
pub(super) async fn qom_set(monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    let path = args.required_str("path")?;
    let property = args.required_str("property")?;
    let value = args.required_any("value")?;
    args.finish()?;
    match device(&monitor, &path)? {
        Some((machine, device)) => {
            let graph = &monitor.graph;
            device
                .set_property(&*machine, graph, &property, value)
                .await?;
        }
        None => monitor.objects.set_property(&path, &property, value)?,
    }
    done()
}

pub(super) async fn qom_list(monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    let path = args.required_str("path")?;
    args.finish()?;
    match device(&monitor, &path)? {
        Some((machine, device)) => Ok(device.list(&*machine)),
        None => monitor.objects.list(&path, monitor.machine().is_some()),
    }
}

pub(super) async fn qom_list_types(_monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    let implements = args.optional_str("implements")?;
    let with_abstract = args.optional_bool("abstract")?.unwrap_or(false);
    args.finish()?;
    Ok(type_names(implements.as_deref(), with_abstract))
}

pub(super) async fn qom_list_properties(_monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    let name = args.required_str("typename")?;
    args.finish()?;
    type_properties(&name)
}
