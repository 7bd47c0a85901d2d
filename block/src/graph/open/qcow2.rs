//! Opening a qcow2 image, and the images that it stands on.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{ChildEntry, Opened, Opening};
use crate::driver::ChildRole;
use crate::drivers::OpenError;
use crate::drivers::qcow2::{self, BackingFileError, Children, Qcow2Driver};
use crate::graph::GraphError;
use crate::node::{Child, Node};
use crate::options::{
    BackingRef, BlockdevOptions, BlockdevRef, DiscardMode, DriverOptions, FileOptions,
    Qcow2Options, RawOptions,
};
use crate::permissions::Permissions;
use crate::runtime::unblock;

impl Opening<'_> {
    pub(super) async fn open_qcow2(
        &mut self,
        image: &Qcow2Options,
        options: &BlockdevOptions,
    ) -> Result<Opened, GraphError> {
        let (file, entry) = self.child(ChildRole::File, &image.file, options).await?;
        let name = self.name(options)?;
        let mut children = vec![entry];
        let below = file.node();
        let may_fall_back = options.auto_read_only.unwrap_or(false);
        let read_only = options.read_only.unwrap_or(false) || (may_fall_back && below.read_only());
        let rights = qcow2::file_permissions(read_only, Permissions::IDLE);
        self.hold(&name, ChildRole::File, &below, rights)?;
        let encrypt = image.encrypt.as_ref();
        let header = qcow2::read_header(&below, read_only, encrypt).await?;
        header.check_options(image)?;

        let data_file = match &image.data_file {
            Some(data_file) => {
                let (data_file, entry) =
                    self.child(ChildRole::DataFile, data_file, options).await?;
                children.push(entry);
                Some(data_file)
            }
            None => None,
        };
        match (&data_file, header.needs_data_file()) {
            (Some(_), true) | (None, false) => {}
            (Some(_), false) => return Err(OpenError::DataFileUnexpected.into()),
            (None, true) => return Err(OpenError::DataFileRequired.into()),
        }

        let backing = self
            .open_backing(&below, &header, image, options)
            .await
            .map_err(|error| match error {
                // Said as often as there are images, it would hide what is wrong.
                GraphError::TooDeep(_) => error,
                error => GraphError::Backing(Box::new(error)),
            })?;
        let backing = backing.map(|(backing, entry)| {
            children.push(entry);
            backing
        });

        let pass_discard = image
            .pass_discard_request
            .unwrap_or(options.discard == Some(DiscardMode::Unmap));
        let edges = Children {
            file,
            data_file,
            backing,
        };
        let driver = Qcow2Driver::open(&name, &header, edges, read_only, pass_discard).await?;
        Ok(Opened::new(name, read_only, Box::new(driver), children))
    }

    async fn open_backing(
        &mut self,
        file: &Arc<Node>,
        header: &qcow2::Header,
        image: &Qcow2Options,
        options: &BlockdevOptions,
    ) -> Result<Option<(Child, ChildEntry)>, GraphError> {
        let child = match (&image.backing, &header.backing) {
            (BackingRef::None, _) | (BackingRef::Header, None) => return Ok(None),
            (BackingRef::Node(child), _) => child.clone(),
            (BackingRef::Header, Some(name)) => {
                let format = header.backing_format.as_deref();
                let path = self.named_file(file, name).await?;
                self.named.push(path.clone());
                let opened = self.open_named(name, format, path, options).await;
                self.named.pop();
                return opened.map(Some);
            }
        };
        self.child(ChildRole::Backing, &child, options)
            .await
            .map(Some)
    }

    /// The file that a header in the node `file` names, if it may be opened.
    async fn named_file(&self, file: &Arc<Node>, name: &str) -> Result<PathBuf, GraphError> {
        let driver = file.skip_filters();
        let filename = driver.driver().filename();
        if driver.driver_name() != "file" || filename.is_empty() {
            let name = name.to_owned();
            return Err(OpenError::from(BackingFileError::NoDirectory { name }).into());
        }
        let allowed = self.graph.backing_directories.borrow().clone();
        let (name, above) = (name.to_owned(), self.named.clone());
        let found =
            unblock(move || qcow2::resolve(&name, Path::new(&filename), &allowed, &above)).await;
        Ok(found.map_err(OpenError::from)?)
    }

    /// Opens the file that a header names, in the format that it says; without one,
    /// in what the file looks like.
    async fn open_named(
        &mut self,
        name: &str,
        format: Option<&str>,
        path: PathBuf,
        parent: &BlockdevOptions,
    ) -> Result<(Child, ChildEntry), GraphError> {
        let file_options = BlockdevOptions::new(DriverOptions::File(FileOptions {
            filename: path.clone(),
            locking: None,
            host_device: false,
            bitmap_file: None,
        }));
        let is_qcow2 = match format {
            Some("qcow2") => true,
            Some("raw" | "file") => false,
            Some(format) => {
                return Err(OpenError::from(BackingFileError::Format {
                    name: name.to_owned(),
                    format: format.to_owned(),
                })
                .into());
            }
            None => looks_like_qcow2(path).await?,
        };
        let file = BlockdevRef::Inline(Box::new(file_options));
        let driver = match is_qcow2 {
            true => DriverOptions::Qcow2(Qcow2Options::new(file)),
            false => DriverOptions::Raw(RawOptions {
                file,
                offset: 0,
                size: None,
            }),
        };
        let backing = BlockdevRef::Inline(Box::new(BlockdevOptions::new(driver)));
        self.child(ChildRole::Backing, &backing, parent).await
    }
}

async fn looks_like_qcow2(path: PathBuf) -> Result<bool, GraphError> {
    use std::io::Read;
    let read = unblock(move || {
        let mut start = Vec::new();
        let read = std::fs::File::open(&path).and_then(|file| file.take(8).read_to_end(&mut start));
        read.map(|_| qcow2::is_qcow2(&start))
            .map_err(|error| OpenError::Open { path, error })
    });
    Ok(read.await?)
}
