//! What a mirror is asked to do, and the checks that need nothing but that.

use std::sync::Arc;
use std::time::Duration;

use block::Node;
use block::runtime::IothreadHandle;

use crate::{CopyMode, OnError};

use super::converge::SECTION_LIMIT;
use super::error::MirrorError;
use super::guard::STALL;

/// Smallest granularity in bytes.
const MIN_GRANULARITY: u32 = 512;
/// Largest granularity in bytes.
const MAX_GRANULARITY: u32 = 64 << 20;
/// Bounds of the granularity that a target's clusters suggest, in bytes.
const CLUSTER_GRANULARITY: std::ops::RangeInclusive<u32> = 4096..=65536;
/// Most chunks that the default granularity makes: 8 MiB of bits, for 256 GiB in
/// chunks of 4 KiB.
const MAX_CHUNKS: u64 = 64 << 20;
/// Default of `buf-size` in bytes.
const DEFAULT_BUF_SIZE: u64 = 16 << 20;
/// Largest `buf-size` that is used, in bytes: more does not copy faster.
const MAX_BUF_SIZE: u64 = 256 << 20;

/// Which data is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncMode {
    /// All that the source shows.
    Full,
    /// Only what the topmost layer holds. For a node without a backing image
    /// that is all.
    Top,
    /// Nothing but new writes.
    None,
    /// What a dirty bitmap says, then reset: refused.
    Incremental,
    /// What a dirty bitmap says: refused.
    Bitmap,
}

/// A mirror to start: the arguments of `blockdev-mirror`, resolved.
#[derive(Clone, Debug)]
pub struct MirrorSpec {
    /// Id of the job. The caller fills in the device's name where the user gave
    /// none.
    pub job_id: String,
    /// The node under the device: the root of what is to be mirrored.
    pub source: Arc<Node>,
    /// The node that becomes its copy.
    pub target: Arc<Node>,
    /// Name of a node to replace instead of the source: one that the source shows through
    /// filters.
    pub replaces: Option<String>,
    /// What to copy.
    pub sync: SyncMode,
    /// Who writes the target.
    pub copy_mode: CopyMode,
    /// Bytes per bit of the dirty bitmap; 0: a default that fits target and size.
    pub granularity: u32,
    /// Bytes of buffers; 0: 16 MiB. Rounded up to the granularity.
    pub buf_size: i64,
    /// Speed limit in bytes per second; 0: none.
    pub speed: i64,
    /// Zeroes may be unmapped on the target.
    pub unmap: bool,
    /// All of the target reads as zeroes, so that a full copy need not write any.
    pub target_is_zero: bool,
    /// Name of the filter node; `None`: one of the graph's own, not listed.
    pub filter_node_name: Option<String>,
    /// What a failed read does.
    pub on_source_error: OnError,
    /// What a failed write does.
    pub on_target_error: OnError,
    /// Finalize by itself.
    pub auto_finalize: bool,
    /// Vanish by itself when concluded.
    pub auto_dismiss: bool,
    /// How long the first attempt to end may hold the guest while the rest is copied
    /// and flushed. Each further attempt may take twice as long, to a limit.
    pub section_limit: Duration,
    /// Switch to write-blocking, for good, when the guest keeps the mirror from getting
    /// on (`copy-mode` `auto`).
    pub switches: bool,
    /// Time from the start after which a mirror that is not ready fails.
    pub deadline: Option<Duration>,
    /// Time without progress after which clients are told.
    pub stall_after: Duration,
    /// Where the job runs; `None`: an iothread of its own.
    pub home: Option<IothreadHandle>,
}

impl MirrorSpec {
    /// A full background mirror with QEMU's defaults.
    pub fn new(job_id: impl Into<String>, source: Arc<Node>, target: Arc<Node>) -> Self {
        Self {
            job_id: job_id.into(),
            source,
            target,
            replaces: None,
            sync: SyncMode::Full,
            copy_mode: CopyMode::Background,
            granularity: 0,
            buf_size: 0,
            speed: 0,
            unmap: true,
            target_is_zero: false,
            filter_node_name: None,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            auto_finalize: true,
            auto_dismiss: true,
            section_limit: SECTION_LIMIT,
            switches: false,
            deadline: None,
            stall_after: STALL,
            home: None,
        }
    }
}

/// Sizes that a mirror works with, all in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// Bytes per bit: a power of two.
    pub(crate) granularity: u64,
    /// All buffers together; a multiple of the granularity.
    pub(crate) buf_size: u64,
}

impl Sizes {
    /// The same with chunks of at least `least` bytes, a power of two or 0.
    pub(crate) fn with_least_granularity(self, least: u64) -> Self {
        let granularity = self.granularity.max(least);
        Self {
            granularity,
            buf_size: self.buf_size.next_multiple_of(granularity),
        }
    }
}

/// The sizes to use for a disk of `size` bytes: what was asked for, or defaults.
///
/// QEMU's default granularity is the target's cluster size, within 4 to 64 KiB,
/// and 64 KiB without clusters. Then a guest that writes 4 KiB here and there
/// dirties sixteen times what it writes, and copying may never catch up. So the
/// default here is 4 KiB where there are no clusters, and more only as far as the
/// bitmap would be too large.
pub(crate) fn sizes(
    granularity: u32,
    buf_size: i64,
    cluster_size: Option<u32>,
    size: u64,
) -> Result<Sizes, MirrorError> {
    let granularity = match (granularity, cluster_size) {
        (0, Some(cluster)) => {
            cluster.clamp(*CLUSTER_GRANULARITY.start(), *CLUSTER_GRANULARITY.end())
        }
        (0, None) => {
            let least = size.div_ceil(MAX_CHUNKS).next_power_of_two();
            u32::try_from(least)
                .unwrap_or(MAX_GRANULARITY)
                .clamp(*CLUSTER_GRANULARITY.start(), MAX_GRANULARITY)
        }
        (given, _) => given,
    };
    if !(MIN_GRANULARITY..=MAX_GRANULARITY).contains(&granularity) {
        return Err(MirrorError::GranularityRange);
    }
    if !granularity.is_power_of_two() {
        return Err(MirrorError::GranularityPowerOfTwo);
    }
    let granularity = u64::from(granularity);
    let buf_size = match u64::try_from(buf_size) {
        Err(_) => return Err(MirrorError::BufSize),
        Ok(0) => DEFAULT_BUF_SIZE,
        Ok(given) => given.min(MAX_BUF_SIZE),
    };
    Ok(Sizes {
        granularity,
        buf_size: buf_size.next_multiple_of(granularity),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn granularity_is_a_power_of_two_in_its_range() {
        let text = |granularity| {
            sizes(granularity, 0, None, 1 << 30)
                .unwrap_err()
                .to_string()
        };
        assert_eq!(text(1000), "Parameter 'granularity' expects a power of 2");
        assert_eq!(text(65537), "Parameter 'granularity' expects a power of 2");
        let range = "Parameter 'granularity' expects a value in range [512B, 64MB]";
        assert_eq!(text(256), range);
        assert_eq!(text(134_217_728), range);
        assert_eq!(sizes(512, 0, None, 1 << 30).unwrap().granularity, 512);
        assert_eq!(
            sizes(64 << 20, 0, None, 1 << 30).unwrap().granularity,
            64 << 20
        );
    }

    #[test]
    fn default_granularity_follows_the_clusters_of_the_target_within_bounds() {
        for (cluster, expected) in [
            (None, 4096),
            (Some(512), 4096),
            (Some(32768), 32768),
            (Some(2 << 20), 65536),
        ] {
            assert_eq!(sizes(0, 0, cluster, 1 << 30).unwrap().granularity, expected);
        }
    }

    #[test]
    fn the_bitmap_of_a_huge_disk_stays_small_by_default() {
        for (size, expected) in [
            (0, 4096),
            (256 << 30, 4096),
            (1 << 40, 16384),
            (1 << 50, 16 << 20),
            (u64::MAX, 64 << 20),
        ] {
            assert_eq!(sizes(0, 0, None, size).unwrap().granularity, expected);
        }
    }

    #[test]
    fn buf_size_is_rounded_up_and_bounded() {
        assert_eq!(sizes(65536, 1, None, 1 << 30).unwrap().buf_size, 65536);
        assert_eq!(sizes(65536, 0, None, 1 << 30).unwrap().buf_size, 16 << 20);
        assert_eq!(
            sizes(65536, i64::MAX, None, 1 << 30).unwrap().buf_size,
            256 << 20
        );
        assert!(matches!(
            sizes(65536, -1, None, 1 << 30),
            Err(MirrorError::BufSize)
        ));
    }
}
