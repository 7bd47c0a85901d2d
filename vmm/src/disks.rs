//! The disks of `diptych run`: from a [`DiskSpec`] to nodes in the block graph,
//! the backend that block jobs know, and the device that the guest sees.

use std::collections::HashMap;
use std::io::{self, Read};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::Context;
use block::runtime::{Iothread, IothreadHandle};
use block::{
    Backend, BackendUser, BlockdevOptions, BlockdevRef, CacheChoice, DiscardMode, DriverOptions,
    FileOptions, Graph, GraphError, OpenError, Perm, PermissionError, Permissions, Qcow2Options,
    RawOptions, bitmap_file_beside,
};
use devices::{VirtioBlk, VirtioBlkConfig};

use crate::config::{DiskSpec, ImageFormat, IothreadSpec};

/// The iothreads of a guest, by id.
pub struct Iothreads {
    threads: Vec<Iothread>,
}

impl Iothreads {
    /// Starts them.
    pub fn start(specs: &[IothreadSpec]) -> anyhow::Result<Self> {
        let threads = specs
            .iter()
            .map(|spec| {
                Iothread::spawn(&spec.id)
                    .with_context(|| format!("Cannot start iothread '{}'", spec.id))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { threads })
    }

    /// The ways to them, in the order they were given.
    pub fn handles(&self) -> impl Iterator<Item = &IothreadHandle> {
        self.threads.iter().map(Iothread::handle)
    }

    /// Stops them, after all requests they have made. May take as long as a
    /// slow disk does.
    pub fn stop(self) {
        self.threads.into_iter().for_each(Iothread::stop);
    }
}

/// A disk that is open and has its device.
pub struct Disk {
    /// Where its data is; block jobs know it by its name, the disk's id.
    pub backend: Arc<Backend>,
    /// What the guest sees.
    pub device: Arc<VirtioBlk>,
}

/// Opens the disks, in their order. `specs` have been checked.
///
/// Errors: one line for the user. Disks opened before stay open.
pub async fn open(
    graph: &Rc<Graph>,
    specs: &[DiskSpec],
    iothreads: &Iothreads,
) -> anyhow::Result<Vec<Disk>> {
    let by_id: HashMap<&str, &IothreadHandle> = iothreads
        .handles()
        .map(|handle| (handle.name(), handle))
        .collect();
    let mut disks = Vec::with_capacity(specs.len());
    for spec in specs {
        let id = spec.id.as_deref().unwrap_or_default();
        let disk = open_one(graph, id, spec, &by_id).await.map_err(|error| {
            let what = match (&spec.path, &spec.node) {
                (Some(path), _) => format!("'{}'", path.display()),
                (None, node) => format!("node '{}'", node.as_deref().unwrap_or_default()),
            };
            let remedy = remedy(&error);
            anyhow::anyhow!("Cannot open disk '{id}' ({what}): {error:#}{remedy}")
        })?;
        disks.push(disk);
    }
    Ok(disks)
}

/// What the user may do about a disk that cannot be opened, to go behind what
/// was wrong; empty if that says all.
fn remedy(error: &anyhow::Error) -> &'static str {
    match error.downcast_ref() {
        Some(GraphError::Permission(PermissionError::Locked { .. })) => {
            "; is another process or disk using the image? Stop that one, or give both readonly=on"
        }
        Some(GraphError::Open(OpenError::Open { error, .. })) => match error.kind() {
            io::ErrorKind::NotFound => {
                "; check the path, or make an image with truncate -s SIZE PATH"
            }
            io::ErrorKind::PermissionDenied => {
                "; check the image's permissions, or give readonly=on to only read it"
            }
            _ => "",
        },
        _ => "",
    }
}

async fn open_one(
    graph: &Rc<Graph>,
    id: &str,
    spec: &DiskSpec,
    iothreads: &HashMap<&str, &IothreadHandle>,
) -> anyhow::Result<Disk> {
    let node = match (&spec.path, &spec.node) {
        (Some(path), _) => {
            let node = graph.blockdev_add(node_options(id, path, spec)).await?;
            if spec.format.is_none() {
                warn_of_other_format(id, path);
            }
            node
        }
        (None, name) => graph.find_node(name.as_deref().unwrap_or_default())?,
    };
    let user = Arc::new(DiskUser { id: id.to_owned() });
    let backend = graph.attach(id, &node, permissions(spec.readonly), Some(user))?;
    let served_by = spec
        .iothread
        .iter()
        .filter_map(|name| iothreads.get(name.as_str()).map(|handle| (*handle).clone()))
        .collect();
    let mut config = VirtioBlkConfig::new(id, Arc::clone(&backend), served_by);
    config.serial = spec.serial.clone().unwrap_or_default();
    config.read_only = spec.readonly;
    config.num_queues = spec.queues;
    config.discard = spec.discard;
    if spec.direct || spec.node.is_some() {
        // What is smaller would have to be read, changed and written back.
        let alignment = node
            .limits()
            .request_alignment
            .max(config.logical_block_size);
        config.logical_block_size = alignment;
        config.physical_block_size = config.physical_block_size.max(alignment);
    }
    let device = Arc::new(VirtioBlk::new(config)?);
    Ok(Disk { backend, device })
}

/// A format node, `ID-raw` or `ID-qcow2`, over a file node, `ID-file`.
fn node_options(id: &str, path: &Path, spec: &DiskSpec) -> BlockdevOptions {
    let options = |name: &str, driver| BlockdevOptions {
        node_name: Some(format!("{id}-{name}")),
        read_only: Some(spec.readonly),
        cache: CacheChoice {
            direct: Some(spec.direct),
            no_flush: None,
        },
        discard: spec.discard.then_some(DiscardMode::Unmap),
        ..BlockdevOptions::new(driver)
    };
    let file = options(
        "file",
        DriverOptions::File(FileOptions {
            filename: path.to_owned(),
            locking: None,
            host_device: false,
            bitmap_file: spec.bitmaps.clone().or_else(|| {
                // Nothing is beside a device.
                path.is_file().then(|| bitmap_file_beside(path)).flatten()
            }),
        }),
    );
    let file = BlockdevRef::Inline(Box::new(file));
    match spec.format.unwrap_or(ImageFormat::Raw) {
        ImageFormat::Raw => options(
            "raw",
            DriverOptions::Raw(RawOptions {
                file,
                offset: 0,
                size: None,
            }),
        ),
        ImageFormat::Qcow2 => options("qcow2", DriverOptions::Qcow2(Qcow2Options::new(file))),
    }
}

/// Tells of an image that looks like another format than the raw one it is taken for. Only
/// whoever made it knows: a guest may have written that into a raw image.
fn warn_of_other_format(id: &str, path: &Path) {
    let mut magic = [0; 4];
    let image = std::fs::File::open(path);
    if image.is_ok_and(|mut image| image.read_exact(&mut magic).is_ok()) && magic == *b"QFI\xfb" {
        tracing::warn!(
            "Disk '{id}' is taken as raw, but '{}' begins as a qcow2 image does; give \
             format=qcow2, or format=raw if that is meant",
            path.display()
        );
    }
}

/// What a disk does with its image, and lets others do: read, and change what
/// does not show (as QEMU's disks without `share-rw`).
fn permissions(readonly: bool) -> Permissions {
    Permissions {
        need: if readonly {
            Perm::CONSISTENT_READ
        } else {
            Perm::CONSISTENT_READ | Perm::WRITE
        },
        share: Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED | Perm::RESIZE,
    }
}

/// The disk's device as the graph knows it. It needs no hooks: a drained
/// section holds its requests at the backend.
struct DiskUser {
    id: String,
}

impl BackendUser for DiskUser {
    fn describe(&self) -> String {
        format!("virtio-blk device '{}'", self.id)
    }
}
