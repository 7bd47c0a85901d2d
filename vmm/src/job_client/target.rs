//! The target of a mirror: a node that is there, or a file or NBD export that
//! nodes are added for, and taken away again when they are of no use.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::error::JobError;
use super::nbd_uri::NbdUri;
use super::report::Report;
use super::server::{Node, Server};

/// Longest name of a node.
const NODE_NAME_MAX: usize = 31;
/// How long a node that was a job's may still be in use when the job has ended.
const RELEASE_TIME: Duration = Duration::from_secs(5);

/// Where a mirror goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A node that the server has.
    Node(String),
    /// A file.
    File(PathBuf),
    /// An NBD export.
    Nbd(NbdUri),
}

/// How a target that is no node yet is opened.
#[derive(Clone, Debug)]
pub struct OpenOptionsOfTarget<'a> {
    /// Its format.
    pub format: &'a str,
    /// Past the page cache.
    pub direct: bool,
}

impl Target {
    /// Finds out what the user means: an NBD address, the name of a node, or a
    /// path. A path with a slash in it is never a node.
    ///
    /// Errors: an NBD address that cannot be used; a path that cannot be made
    /// absolute.
    pub fn find(text: &str, nodes: &[Node]) -> Result<Self, JobError> {
        if let Some(uri) = NbdUri::parse(text) {
            return uri.map(Self::Nbd).map_err(JobError::Usage);
        }
        if nodes.iter().any(|node| node.name == text) {
            return Ok(Self::Node(text.to_owned()));
        }
        // The server has another current directory.
        let path = std::path::absolute(text).map_err(|source| JobError::Create {
            path: text.into(),
            source,
        })?;
        // Nor can a monitor be told of any other path.
        if path.to_str().is_none() {
            return Err(JobError::Usage(format!(
                "Target '{}' is not in UTF-8, as a monitor wants it: give an absolute path",
                path.display()
            )));
        }
        Ok(Self::File(path))
    }

    /// The options of the node to add.
    fn node_options(&self, name: &str, how: &OpenOptionsOfTarget<'_>) -> Option<Value> {
        let mut protocol = match self {
            Self::Node(_) => return None,
            Self::File(path) => {
                let driver = if is_block_device(path) {
                    "host_device"
                } else {
                    "file"
                };
                json!({"driver": driver, "filename": path, "discard": "unmap"})
            }
            Self::Nbd(uri) => uri.node_options(),
        };
        protocol["discard"] = "unmap".into();
        let direct = how.direct && matches!(self, Self::File(_));
        if direct {
            protocol["cache"] = json!({"direct": true});
        }
        if matches!(self, Self::Nbd(_)) && how.format == "raw" {
            protocol["node-name"] = name.into();
            return Some(protocol);
        }
        let mut options = json!({
            "driver": how.format,
            "node-name": name,
            "discard": "unmap",
            "file": protocol,
        });
        if direct {
            options["cache"] = json!({"direct": true});
        }
        Some(options)
    }
}

fn is_block_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
}

/// A file that was made for a mirror; dropping it removes the file, unless it is
/// kept.
#[derive(Debug)]
pub struct CreatedFile(Option<PathBuf>);

impl CreatedFile {
    /// Makes a sparse file, unless there is something already. It is the user's
    /// alone (mode 0600, less what the umask takes).
    pub fn create(path: &Path, size: u64) -> Result<Self, JobError> {
        let failed = |source| JobError::Create {
            path: path.to_owned(),
            source,
        };
        let opened = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path);
        let file = match opened {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(Self(None)),
            Err(error) => return Err(failed(error)),
        };
        let created = Self(Some(path.to_owned()));
        file.set_len(size).map_err(failed)?;
        Ok(created)
    }

    /// A job writes to it: it stays.
    pub fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for CreatedFile {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // Empty, and nobody was told of it.
            let _ = fs::remove_file(path);
        }
    }
}

/// A name for a node of the job `id` that nobody has.
pub fn free_node_name(id: &str, nodes: &[Node]) -> String {
    let is_taken = |name: &str| nodes.iter().any(|node| node.name == name);
    let suffixes = std::iter::once("-target".to_owned())
        .chain((2_u32..).map(|number| format!("-target{number}")));
    suffixes
        .map(|suffix| {
            let room = NODE_NAME_MAX.saturating_sub(suffix.len());
            let stem: String = id.chars().take(room).collect();
            stem + &suffix
        })
        .find(|name| !is_taken(name))
        .unwrap_or_default()
}

/// Adds the nodes of a target; a target that is a node needs none.
pub fn add(
    target: &Target,
    name: &str,
    how: &OpenOptionsOfTarget<'_>,
    server: &mut Server,
) -> Result<(), JobError> {
    match target.node_options(name, how) {
        Some(options) => server.run("blockdev-add", options).map(drop),
        None => Ok(()),
    }
}

/// Takes a node away that was added for a job, which may just be ending. A
/// failure is told, not more: what was asked for is over.
pub fn take_away(name: &str, server: &mut Server, report: &mut Report) -> Result<(), JobError> {
    match delete(name, server) {
        Err(error) if error.status() == super::status::FAILED => {
            report.note(&format!("Node '{name}' could not be taken away: {error}"))
        }
        result => result,
    }
}

/// Takes a node away that a job may be about to leave.
pub fn delete(name: &str, server: &mut Server) -> Result<(), JobError> {
    let deadline = Instant::now() + RELEASE_TIME;
    loop {
        match server.run("blockdev-del", json!({"node-name": name})) {
            Ok(_) => return Ok(()),
            Err(error) if error.status() != super::status::FAILED => return Err(error),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> Node {
        Node {
            name: name.to_owned(),
            size: 0,
        }
    }

    const RAW: OpenOptionsOfTarget<'static> = OpenOptionsOfTarget {
        format: "raw",
        direct: false,
    };

    #[test]
    fn a_target_is_an_address_or_a_node_or_a_path() {
        let nodes = [node("disk"), node("/tmp/x")];
        let find = |text| Target::find(text, &nodes).unwrap();
        assert_eq!(find("disk"), Target::Node("disk".to_owned()));
        let here = std::env::current_dir().unwrap();
        assert_eq!(find("./disk"), Target::File(here.join("disk")));
        assert_eq!(find("copy.img"), Target::File(here.join("copy.img")));
        assert!(matches!(find("nbd://h/x"), Target::Nbd(_)));
        assert!(matches!(
            Target::find("nbds://h/x", &nodes),
            Err(JobError::Usage(_))
        ));
    }

    #[test]
    fn nodes_are_added_for_files_and_exports_only() {
        let options = |text: &str, how| {
            let target = Target::find(text, &[node("n")]).unwrap();
            target.node_options("t", &how)
        };
        assert_eq!(options("n", RAW), None);
        assert_eq!(
            options("/a/b", RAW).unwrap(),
            json!({"driver": "raw", "node-name": "t", "discard": "unmap",
                   "file": {"driver": "file", "filename": "/a/b", "discard": "unmap"}})
        );
        let qcow2 = OpenOptionsOfTarget {
            format: "qcow2",
            direct: true,
        };
        let options_of_file = options("/a/b", qcow2.clone()).unwrap();
        assert_eq!(options_of_file["driver"], "qcow2");
        assert_eq!(options_of_file["file"]["cache"]["direct"], true);
        assert_eq!(
            options("nbd://h/x", RAW).unwrap()["node-name"],
            options("nbd://h/x", qcow2).unwrap()["node-name"]
        );
        assert_eq!(options("nbd://h/x", RAW).unwrap()["driver"], "nbd");
    }

    #[test]
    fn names_of_nodes_are_free_and_short() {
        assert_eq!(free_node_name("j", &[]), "j-target");
        let taken = [node("j-target"), node("j-target2")];
        assert_eq!(free_node_name("j", &taken), "j-target3");
        let long = free_node_name(&"x".repeat(100), &[]);
        assert_eq!(long.len(), NODE_NAME_MAX);
        assert!(long.ends_with("-target"));
    }

    #[test]
    fn a_file_is_created_only_where_nothing_is_and_kept_only_if_used() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.img");
        drop(CreatedFile::create(&path, 4096).unwrap());
        assert!(!path.exists());
        CreatedFile::create(&path, 4096).unwrap().keep();
        assert_eq!(fs::metadata(&path).unwrap().len(), 4096);
        // Neither its size nor its existence changes.
        drop(CreatedFile::create(&path, 8192).unwrap());
        assert_eq!(fs::metadata(&path).unwrap().len(), 4096);
        let error = CreatedFile::create(&folder.path().join("none/t"), 1).unwrap_err();
        assert!(matches!(error, JobError::Create { .. }), "{error}");
    }
}
