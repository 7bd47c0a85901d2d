//! What `blockdev-add` can say of a node, as plain typed options.
//!
//! The wire form (JSON, `key=value`) and its error texts are `vmm`'s.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::driver::ChildRole;
use crate::drivers::blkdebug::{InjectError, SetState};
use crate::drivers::copy_before_write::CbwPolicy;
use crate::node::NodeOptions;
use crate::permissions::Perm;

/// A node to be opened.
///
/// What is `None` was not said: a child that is opened with its parent takes it from
/// there, any other has the default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockdevOptions {
    /// Name; `None` lets the graph make one (`#block` and a number).
    pub node_name: Option<String>,
    /// Open for reading only. By default writable.
    pub read_only: Option<bool>,
    /// Fall back to read-only where the file does not allow writing. By default not.
    pub auto_read_only: Option<bool>,
    /// Cache behaviour.
    pub cache: CacheChoice,
    /// What a discard does. By default nothing.
    pub discard: Option<DiscardMode>,
    /// What a write of zeroes as data does. Never inherited.
    pub detect_zeroes: DetectZeroes,
    /// The driver and its own options.
    pub driver: DriverOptions,
    /// Options that make this node another one than others of its driver over the same
    /// children, as far as they were said, by QMP's names: what it is called after.
    pub said: Vec<(String, OptionValue)>,
    /// How the driver's own options were written.
    pub written: Written,
}

/// The members of a driver's own options as they were written, without its children: a
/// reopen has to repeat those that cannot be changed, also where they have their default.
///
/// Two are always equal: what was written otherwise means the same.
#[derive(Clone, Debug, Default, Eq)]
pub struct Written {
    /// By path, with dots; values in JSON. `None`: they were not written in JSON, and
    /// nothing follows from that.
    members: Option<BTreeMap<String, String>>,
}

impl Written {
    /// These members.
    pub fn new(members: BTreeMap<String, String>) -> Self {
        Self {
            members: Some(members),
        }
    }

    /// The first option of `old` that `self` leaves out, and the first that it changes,
    /// as far as `driver` allows neither.
    pub(crate) fn refused_after<'a>(
        &'a self,
        old: &'a Self,
        driver: &DriverOptions,
    ) -> (Option<&'a str>, Option<&'a str>) {
        let (Some(old), Some(new)) = (&old.members, &self.members) else {
            return (None, None);
        };
        let mut left_out = old.keys().filter(|name| !new.contains_key(*name));
        let mut changed = new
            .iter()
            .filter(|(name, value)| old.get(*name) != Some(value))
            .map(|(name, _)| name);
        (
            left_out
                .find(|name| !driver.may_reset(name))
                .map(String::as_str),
            changed
                .find(|name| !driver.may_change(name))
                .map(String::as_str),
        )
    }
}

impl PartialEq for Written {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// An option as it was said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionValue {
    /// A number.
    Int(i64),
    /// Yes or no.
    Bool(bool),
    /// A text or a word.
    Text(String),
}

impl BlockdevOptions {
    /// Options of a node without a name that say nothing but this.
    pub fn new(driver: DriverOptions) -> Self {
        Self {
            node_name: None,
            read_only: None,
            auto_read_only: None,
            cache: CacheChoice::default(),
            discard: None,
            detect_zeroes: DetectZeroes::Off,
            driver,
            said: Vec::new(),
            written: Written::default(),
        }
    }

    /// How long opening the node may wait for servers, with all that is opened with
    /// it; `None`: it waits for none.
    pub fn server_patience(&self) -> Option<Duration> {
        let own = match &self.driver {
            DriverOptions::Nbd(nbd) => Some(nbd.patience()),
            _ => None,
        };
        let inline = |(_, child): (ChildRole, ChildChoice<'_>)| match child {
            ChildChoice::Node(BlockdevRef::Inline(options)) => options.server_patience(),
            ChildChoice::Node(BlockdevRef::Name(_)) | ChildChoice::Nothing => None,
        };
        let below = self.driver.children().into_iter().filter_map(inline);
        own.into_iter()
            .chain(below)
            .reduce(Duration::saturating_add)
    }

    /// What holds for the node whatever its driver, with the defaults of what was
    /// not said.
    pub fn node_options(&self) -> NodeOptions {
        NodeOptions {
            read_only: self.read_only.unwrap_or(false),
            discard: self.discard.unwrap_or_default(),
            detect_zeroes: self.detect_zeroes,
            cache: CacheOptions {
                direct: self.cache.direct.unwrap_or(false),
                no_flush: self.cache.no_flush.unwrap_or(false),
            },
        }
    }
}

/// `cache.direct` and `cache.no-flush`, as far as they were said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheChoice {
    /// See [`CacheOptions::direct`].
    pub direct: Option<bool>,
    /// See [`CacheOptions::no_flush`].
    pub no_flush: Option<bool>,
}

/// `cache.direct` and `cache.no-flush`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheOptions {
    /// Bypass the host's page cache (O_DIRECT).
    pub direct: bool,
    /// Ignore flushes: fast, and unsafe on a host crash.
    pub no_flush: bool,
}

/// `discard`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiscardMode {
    /// Discards do nothing.
    #[default]
    Ignore,
    /// Discards free space.
    Unmap,
}

/// `detect-zeroes`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// Data is written as it is.
    #[default]
    Off,
    /// Zeroes are written as zeroes.
    On,
    /// Zeroes are written as zeroes, and may be unmapped.
    Unmap,
}

/// A child: a node that exists, or one to be opened with its parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockdevRef {
    /// An existing node's name.
    Name(String),
    /// Options of a new node, owned by its parent.
    Inline(Box<BlockdevOptions>),
}

/// Options of one driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DriverOptions {
    /// A file or block device of the host.
    File(FileOptions),
    /// The raw format: another node's bytes, or a part of them.
    Raw(RawOptions),
    /// An image of QEMU's format.
    Qcow2(Qcow2Options),
    /// Reads as zeroes or garbage, forgets writes.
    NullCo(NullCoOptions),
    /// An export of an NBD server.
    Nbd(NbdOptions),
    /// Lets chosen requests to another node fail.
    Blkdebug(BlkdebugOptions),
    /// Limits the rate of requests to another node.
    Throttle(ThrottleOptions),
    /// Takes space of a file before a format needs it.
    Preallocate(PreallocateOptions),
    /// Copies what is read from backing images.
    CopyOnRead(CopyOnReadOptions),
    /// Copies what is about to be changed to a target.
    CopyBeforeWrite(CopyBeforeWriteOptions),
    /// Shows what a `copy-before-write` filter keeps.
    SnapshotAccess(SnapshotAccessOptions),
}

/// What options say of a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildChoice<'a> {
    /// There is to be none: `"backing": null`.
    Nothing,
    /// This one.
    Node(&'a BlockdevRef),
}

impl DriverOptions {
    /// QEMU's name of the driver.
    pub fn driver_name(&self) -> &'static str {
        match self {
            Self::File(options) if options.host_device => "host_device",
            Self::File(_) => "file",
            Self::Raw(_) => "raw",
            Self::Blkdebug(_) => "blkdebug",
            Self::Qcow2(_) => "qcow2",
            Self::NullCo(_) => "null-co",
            Self::Nbd(_) => "nbd",
            Self::Throttle(_) => "throttle",
            Self::Preallocate(_) => "preallocate",
            Self::CopyOnRead(_) => "copy-on-read",
            Self::CopyBeforeWrite(_) => "copy-before-write",
            Self::SnapshotAccess(_) => "snapshot-access",
        }
    }

    /// The children that they name, or say that there be none. One that they say
    /// nothing of is left out.
    pub fn children(&self) -> Vec<(ChildRole, ChildChoice<'_>)> {
        match self {
            Self::File(_) | Self::NullCo(_) | Self::Nbd(_) => Vec::new(),
            Self::Raw(options) => vec![(ChildRole::File, ChildChoice::Node(&options.file))],
            Self::Blkdebug(options) => {
                vec![(ChildRole::Image, ChildChoice::Node(&options.image))]
            }
            Self::Throttle(options) => vec![(ChildRole::File, ChildChoice::Node(&options.file))],
            Self::Preallocate(options) => {
                vec![(ChildRole::File, ChildChoice::Node(&options.file))]
            }
            Self::CopyOnRead(options) => {
                vec![(ChildRole::File, ChildChoice::Node(&options.file))]
            }
            Self::CopyBeforeWrite(options) => vec![
                (ChildRole::File, ChildChoice::Node(&options.file)),
                (ChildRole::Target, ChildChoice::Node(&options.target)),
            ],
            Self::SnapshotAccess(options) => {
                vec![(ChildRole::File, ChildChoice::Node(&options.file))]
            }
            Self::Qcow2(options) => {
                let mut children = vec![(ChildRole::File, ChildChoice::Node(&options.file))];
                let data_file = options.data_file.iter();
                children.extend(data_file.map(|r| (ChildRole::DataFile, ChildChoice::Node(r))));
                match &options.backing {
                    BackingRef::Header => {}
                    BackingRef::None => children.push((ChildRole::Backing, ChildChoice::Nothing)),
                    BackingRef::Node(node) => {
                        children.push((ChildRole::Backing, ChildChoice::Node(node)));
                    }
                }
                children
            }
        }
    }

    /// Whether an open node of theirs can get other options at all.
    pub(crate) fn can_be_reopened(&self) -> bool {
        match self {
            Self::CopyOnRead(_) | Self::CopyBeforeWrite(_) | Self::SnapshotAccess(_) => false,
            Self::File(_)
            | Self::Raw(_)
            | Self::Qcow2(_)
            | Self::NullCo(_)
            | Self::Nbd(_)
            | Self::Blkdebug(_)
            | Self::Throttle(_)
            | Self::Preallocate(_) => true,
        }
    }

    /// Whether a reopen may leave an option of theirs out, by its path.
    fn may_reset(&self, name: &str) -> bool {
        match self {
            Self::File(_) => name == "x-check-cache-dropped",
            Self::Raw(_) => ["offset", "size"].contains(&name),
            Self::Throttle(_) => name == "throttle-group",
            // Those cannot be reopened at all, and say so.
            Self::Qcow2(_)
            | Self::CopyOnRead(_)
            | Self::CopyBeforeWrite(_)
            | Self::SnapshotAccess(_) => true,
            Self::NullCo(_) | Self::Nbd(_) | Self::Blkdebug(_) | Self::Preallocate(_) => false,
        }
    }

    /// Whether a reopen may give an option of theirs that was not given, or another value.
    fn may_change(&self, name: &str) -> bool {
        match self {
            Self::File(_) => ["drop-cache", "x-check-cache-dropped"].contains(&name),
            Self::Preallocate(_) => true,
            _ => self.may_reset(name),
        }
    }

    /// An option of theirs that an open node cannot do without, if there is one.
    pub(crate) fn fixed_option(&self) -> Option<&'static str> {
        match self {
            Self::File(_) => Some("filename"),
            Self::Nbd(_) => Some("server.type"),
            Self::Raw(_)
            | Self::Qcow2(_)
            | Self::Throttle(_)
            | Self::Preallocate(_)
            | Self::Blkdebug(_)
            | Self::CopyOnRead(_)
            | Self::CopyBeforeWrite(_)
            | Self::SnapshotAccess(_) => None,
            Self::NullCo(options) => options.not_default(),
        }
    }
}

/// Options of `file` and `host_device`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileOptions {
    /// Path of the file.
    pub filename: PathBuf,
    /// Image locking; `None` is `auto`: on where the file system has it.
    pub locking: Option<bool>,
    /// Driver `host_device` was asked for: the file must be a block device.
    pub host_device: bool,
    /// Where persistent bitmaps are kept. `None`: beside a file that is there, with `.bitmaps`
    /// added to its name; new ones only for formats in which QEMU keeps some.
    pub bitmap_file: Option<PathBuf>,
}

/// Options of `raw`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawOptions {
    /// Where the data is.
    pub file: BlockdevRef,
    /// First byte of the part that is shown.
    pub offset: u64,
    /// Length of that part in bytes; `None`: up to the end.
    pub size: Option<u64>,
}

/// Options of `qcow2`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Options {
    /// Where the image is.
    pub file: BlockdevRef,
    /// Where its data is, if not in the image.
    pub data_file: Option<BlockdevRef>,
    /// What shows through.
    pub backing: BackingRef,
    /// Whether what is discarded in the image is discarded in its file; `None`: if
    /// `discard` says unmap.
    pub pass_discard_request: Option<bool>,
    /// Asked for, which the image has to allow. Nothing comes of it.
    pub lazy_refcounts: bool,
    /// As `lazy_refcounts`; in bytes.
    pub l2_cache_entry_size: Option<u64>,
    /// How the image is said to be encrypted, which none is that can be used.
    pub encrypt: Option<EncryptOptions>,
}

/// `encrypt` of `qcow2`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncryptOptions {
    /// `aes` or `luks`.
    pub format: &'static str,
    /// Id of an object with the key.
    pub key_secret: Option<String>,
}

impl Qcow2Options {
    /// The image in `file`, with what its header says.
    pub fn new(file: BlockdevRef) -> Self {
        Self {
            file,
            data_file: None,
            backing: BackingRef::Header,
            pass_discard_request: None,
            lazy_refcounts: false,
            l2_cache_entry_size: None,
            encrypt: None,
        }
    }
}

/// A backing image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackingRef {
    /// What the image's header names, if anything.
    Header,
    /// None, whatever the header says.
    None,
    /// This one, whatever the header says.
    Node(BlockdevRef),
}

impl NullCoOptions {
    /// An option that has not its default value, by QEMU's name.
    fn not_default(&self) -> Option<&'static str> {
        let default = Self::default();
        if self.read_zeroes != default.read_zeroes {
            Some("read-zeroes")
        } else if self.size != default.size {
            Some("size")
        } else if self.latency_ns != default.latency_ns {
            Some("latency-ns")
        } else {
            None
        }
    }
}

impl Default for NullCoOptions {
    fn default() -> Self {
        Self {
            aio: false,
            size: 1 << 30,
            latency_ns: 0,
            read_zeroes: false,
        }
    }
}

/// Options of `null-co` and `null-aio`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NullCoOptions {
    /// Driver `null-aio` was asked for: the same by another name.
    pub aio: bool,
    /// Size in bytes (QEMU's default: 1 GiB).
    pub size: u64,
    /// Time that each request takes, in nanoseconds.
    pub latency_ns: u64,
    /// Reads give zeroes; else buffers are left as they are.
    pub read_zeroes: bool,
}

/// Options of `nbd`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdOptions {
    /// Where the server is.
    pub server: SocketAddress,
    /// Name of the export; empty for the server's default one.
    pub export: String,
    /// The context that block status is asked of instead of `base:allocation`: what it has set
    /// shows as neither data nor zeroes, and the rest as data.
    pub dirty_bitmap: Option<String>,
    /// How long requests wait for a server that is lost to return before they fail.
    /// Zero: not at all.
    pub reconnect_delay: Duration,
    /// How long to try to reach the server when the node is opened. Zero: one
    /// attempt.
    pub open_timeout: Duration,
}

impl NbdOptions {
    /// How long one attempt to reach the server may take.
    pub(crate) const ATTEMPT: Duration = Duration::from_secs(30);

    /// How long the server may take to offer the export when the node is opened.
    fn patience(&self) -> Duration {
        match self.open_timeout.is_zero() {
            true => Self::ATTEMPT,
            false => self.open_timeout,
        }
    }
}

/// Where a server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocketAddress {
    /// A socket of this host.
    Unix {
        /// Its path, or its name.
        path: PathBuf,
        /// A name in the abstract name space, no path.
        is_abstract: bool,
        /// An abstract name ends with its last byte; else it is padded with NULs.
        tight: bool,
    },
    /// A TCP port.
    Inet(InetAddress),
}

/// A TCP port of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InetAddress {
    /// Name or address.
    pub host: String,
    /// Port, as a number or the name of a service.
    pub port: String,
    /// Whether IPv4 may be used; `None`: if IPv6 is not asked for.
    pub ipv4: Option<bool>,
    /// Whether IPv6 may be used; `None`: if IPv4 is not asked for.
    pub ipv6: Option<bool>,
    /// Probe an idle connection, so that a dead peer is noticed.
    pub keep_alive: bool,
}

impl fmt::Display for SocketAddress {
    /// The path, or `host:port`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix { path, .. } => path.display().fmt(f),
            Self::Inet(inet) => write!(f, "{}:{}", inet.host, inet.port),
        }
    }
}

/// Options of `blkdebug`. Limits are in bytes; 0: those of the node below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlkdebugOptions {
    /// The node whose data it shows.
    pub image: BlockdevRef,
    /// A file of rules, which come before those given here.
    pub config: Option<PathBuf>,
    /// Alignment of requests.
    pub align: u64,
    /// Largest request.
    pub max_transfer: u32,
    /// Best unit of zero writes.
    pub opt_write_zero: u32,
    /// Largest zero write.
    pub max_write_zero: u32,
    /// Best unit of discards.
    pub opt_discard: u32,
    /// Largest discard.
    pub max_discard: u32,
    /// Requests that fail.
    pub inject_error: Vec<InjectError>,
    /// What changes the state that they depend on.
    pub set_state: Vec<SetState>,
    /// Rights that it needs of the image beside those of its users.
    pub take_child_perms: Perm,
    /// Rights that it denies others whatever its users do.
    pub unshare_child_perms: Perm,
}

/// Options of `preallocate`. Negative numbers are refused when the node is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreallocateOptions {
    /// The file.
    pub file: BlockdevRef,
    /// Where the file may end, in bytes (QEMU's default: 1 MiB): a multiple of 512.
    pub align: i64,
    /// How much is taken past what is needed, in bytes (QEMU's default: 128 MiB).
    pub size: i64,
}

impl PreallocateOptions {
    /// With QEMU's defaults.
    pub fn new(file: BlockdevRef) -> Self {
        Self {
            file,
            align: 1 << 20,
            size: 128 << 20,
        }
    }
}

/// Options of `copy-on-read`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyOnReadOptions {
    /// The image.
    pub file: BlockdevRef,
    /// Name of the lowest layer that is copied from; `None`: all are.
    pub bottom: Option<String>,
}

/// Options of `copy-before-write`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyBeforeWriteOptions {
    /// The disk.
    pub file: BlockdevRef,
    /// Where its old content is kept.
    pub target: BlockdevRef,
    /// Names of a node and of a bitmap of it: only what is dirty there at the start is
    /// kept. `None`: everything is.
    pub bitmap: Option<(String, String)>,
    /// How guests' requests are treated.
    pub policy: CbwPolicy,
}

/// Options of `snapshot-access`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotAccessOptions {
    /// The filter.
    pub file: BlockdevRef,
}

/// Options of `throttle`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThrottleOptions {
    /// Name of the group whose limits it shares.
    pub group: String,
    /// The node whose data it shows.
    pub file: BlockdevRef,
}
