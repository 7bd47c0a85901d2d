//! What a group allows: rates, bursts, and which of them go together.

/// Largest rate, and largest product of a burst's rate and length.
const MAX_VALUE: u64 = 1_000_000_000_000_000;

/// A rate, and how far it may be exceeded for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// Bytes or requests per second in the long run; 0: no limit.
    pub rate: u64,
    /// Bytes or requests per second in a burst; 0: bursts are only what `rate`
    /// allows in 100 ms.
    pub burst: u64,
    /// Seconds that a burst of `burst` may last; at least 1.
    pub burst_seconds: u32,
}

impl Default for RateLimit {
    fn default() -> Self {
        Self {
            rate: 0,
            burst: 0,
            burst_seconds: 1,
        }
    }
}

/// The limits of a throttle group. The default is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThrottleLimits {
    /// `bps-total`: bytes read and written.
    pub bps_total: RateLimit,
    /// `bps-read`.
    pub bps_read: RateLimit,
    /// `bps-write`: bytes written, zeroed and discarded.
    pub bps_write: RateLimit,
    /// `iops-total`: requests of all kinds.
    pub iops_total: RateLimit,
    /// `iops-read`.
    pub iops_read: RateLimit,
    /// `iops-write`: writes, zeroes and discards.
    pub iops_write: RateLimit,
    /// `iops-size`: a request of more bytes counts as several; 0: as one.
    pub iops_size: u64,
}

/// Limits that make no sense. The texts are QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitsError {
    /// A limit of the total beside one of reads or writes.
    #[error("bps/iops/max total values and read/write values cannot be used at the same time")]
    TotalAndParts,
    /// `iops-size` without a limit on requests.
    #[error("iops size requires an iops value to be set")]
    SizeWithoutIops,
    /// A rate that is too high.
    #[error("bps/iops/max values must be within [0, {MAX_VALUE}]")]
    TooHigh,
    /// A burst of no length.
    #[error("the burst length cannot be 0")]
    ZeroBurstLength,
    /// A burst's length without its rate.
    #[error("burst length set without burst rate")]
    LengthWithoutBurst,
    /// A burst of too many bytes or requests.
    #[error("burst length too high for this burst rate")]
    BurstTooLong,
    /// A burst's rate without a limit to exceed.
    #[error("bps_max/iops_max require corresponding bps/iops values")]
    BurstWithoutRate,
    /// A burst's rate that is below the limit.
    #[error("bps_max/iops_max cannot be lower than bps/iops")]
    BurstBelowRate,
}

impl ThrottleLimits {
    /// Whether anything is limited at all.
    pub fn any(&self) -> bool {
        self.each().iter().any(|limit| limit.rate > 0)
    }

    /// Bytes, then requests; each total, read, write.
    pub(super) fn each(&self) -> [RateLimit; 6] {
        [
            self.bps_total,
            self.bps_read,
            self.bps_write,
            self.iops_total,
            self.iops_read,
            self.iops_write,
        ]
    }

    /// Fails if they cannot be used together, with what QEMU would say.
    pub fn check(&self) -> Result<(), LimitsError> {
        let [bps, iops] = [
            [self.bps_total, self.bps_read, self.bps_write],
            [self.iops_total, self.iops_read, self.iops_write],
        ];
        for [total, read, write] in [bps, iops] {
            let rates = total.rate > 0 && (read.rate > 0 || write.rate > 0);
            let bursts = total.burst > 0 && (read.burst > 0 || write.burst > 0);
            if rates || bursts {
                return Err(LimitsError::TotalAndParts);
            }
        }
        if self.iops_size > 0 && iops.iter().all(|limit| limit.rate == 0) {
            return Err(LimitsError::SizeWithoutIops);
        }
        self.each().iter().try_for_each(RateLimit::check)
    }
}

impl RateLimit {
    fn check(&self) -> Result<(), LimitsError> {
        if self.rate > MAX_VALUE || self.burst > MAX_VALUE {
            return Err(LimitsError::TooHigh);
        }
        if self.burst_seconds == 0 {
            return Err(LimitsError::ZeroBurstLength);
        }
        if self.burst_seconds > 1 && self.burst == 0 {
            return Err(LimitsError::LengthWithoutBurst);
        }
        if self.burst > 0 && u64::from(self.burst_seconds) > MAX_VALUE / self.burst {
            return Err(LimitsError::BurstTooLong);
        }
        if self.burst > 0 && self.rate == 0 {
            return Err(LimitsError::BurstWithoutRate);
        }
        if self.burst > 0 && self.burst < self.rate {
            return Err(LimitsError::BurstBelowRate);
        }
        Ok(())
    }
}
