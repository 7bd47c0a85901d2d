//! The command line of the storage daemon. What sets things up is carried out in
//! the order in which it was said, as QEMU's storage daemon does.

use std::path::PathBuf;

use block::BlockdevOptions;
use clap::error::ErrorKind;
use clap::{ArgMatches, Args, Command, FromArgMatches};

use super::chardev::{Chardev, ChardevError, MonitorOption, chardev_help, monitor_help};
use crate::monitor::{
    ExportArgs, HelpTopic, NbdServerArgs, ObjectOptions, QmpAddress, QmpError, option_help,
    parse_export, parse_nbd_server,
};
use crate::set_up::{BLOCKDEV_PARSER, HelpfulParser, OBJECT_PARSER};

/// One step of setting up.
#[derive(Clone, Debug)]
pub(super) enum Step {
    /// A monitor on a socket of its own.
    Qmp(QmpAddress),
    /// A socket that listens.
    Chardev(Chardev),
    /// A monitor on a chardev.
    Monitor(MonitorOption),
    /// An object.
    Object(Box<ObjectOptions>),
    /// A node.
    Blockdev(Box<BlockdevOptions>),
    /// The NBD server.
    NbdServer(Box<NbdServerArgs>),
    /// An export.
    Export(Box<ExportArgs>),
}

/// Arguments of `diptych storage-daemon`.
#[derive(Debug)]
pub struct StorageDaemonArgs {
    /// In the order of the command line.
    pub(super) steps: Vec<Step>,
    /// Where headers of images may name backing files, besides their own directory.
    pub(super) backing_directories: Vec<PathBuf>,
    /// Where the process' number goes.
    pub(super) pidfile: Option<PathBuf>,
    /// Go on in the background.
    pub(super) daemonize: bool,
}

/// The arguments as clap knows them: by name.
#[derive(Debug, Args)]
#[command(
    group(clap::ArgGroup::new("reachable").required(true).multiple(true)),
    after_help = "\
What is said first is done first: an object comes before the node that uses it,
a chardev before its monitor, the NBD server before its exports. JSON is understood wherever key=value is.

help in the place of options lists what there is, KIND,help what one kind takes:
--blockdev help, --blockdev raw,help, --chardev socket,help, --export nbd,help.

With --daemonize the status is 0 when everything is open and listening; if that
fails, it is that of a failure, and stderr says why.

Exit status: 0 ended by quit or a signal, 1 an error, or storage that hung at the
end (given up after 4.5 s), 2 wrong usage."
)]
struct Flags {
    /// Listen for QMP clients on a unix socket, or on one that was passed
    /// (fd:NUMBER, or fd:NAME by LISTEN_FDNAMES; may be given several times)
    #[arg(long, value_name = "unix:PATH", group = "reachable")]
    qmp: Vec<QmpAddress>,

    /// A listening socket as QEMU says it, for --monitor:
    /// socket,path=PATH,server=on,wait=off,id=ID (or, for path, fd=NUMBER or
    /// host=HOST,port=PORT, where whoever reaches the port may connect); or stdio,id=ID
    #[arg(long, value_name = "OPTIONS", value_parser = CHARDEV_PARSER)]
    chardev: Vec<Chardev>,

    /// Listen for QMP clients on a chardev: [chardev=]ID[,mode=control]
    #[arg(long, value_name = "OPTIONS", value_parser = MONITOR_PARSER, group = "reachable")]
    monitor: Vec<MonitorOption>,

    /// Make an object, as object-add does: JSON, or TYPE,id=NAME,key=value,...
    /// (throttle-group, iothread; may be given several times)
    #[arg(long, value_name = "OPTIONS", value_parser = OBJECT_PARSER)]
    object: Vec<ObjectOptions>,

    /// Open a node, as blockdev-add does: JSON, or key=value,... with dots for
    /// what is nested and doubled commas in values (may be given several times)
    #[arg(long, value_name = "OPTIONS", value_parser = BLOCKDEV_PARSER)]
    blockdev: Vec<BlockdevOptions>,

    /// Let the headers of images name backing files in this directory, or below it,
    /// besides the image's own (may be given several times)
    #[arg(long, value_name = "DIRECTORY")]
    backing_directory: Vec<PathBuf>,

    /// Start the NBD server, as nbd-server-start does: JSON, or
    /// addr.type=unix,addr.path=PATH or addr.type=inet,addr.host=HOST,addr.port=PORT
    /// or, for a socket that was passed, addr.type=fd,addr.str=NUMBER-OR-NAME
    #[arg(long, value_name = "OPTIONS", value_parser = NBD_SERVER_PARSER, group = "reachable")]
    nbd_server: Vec<NbdServerArgs>,

    /// Export a node, as block-export-add does: JSON, or
    /// nbd,id=ID,node-name=NODE,name=NAME,writable=on,... (may be given several times)
    #[arg(long, value_name = "OPTIONS", value_parser = EXPORT_PARSER, group = "reachable")]
    export: Vec<ExportArgs>,

    /// Write the process' number to a file when everything is ready; it is locked
    /// until the end, and then removed
    #[arg(long, value_name = "PATH")]
    pidfile: Option<PathBuf>,

    /// Go on in the background when everything is ready
    #[arg(long)]
    daemonize: bool,
}

const CHARDEV_PARSER: HelpfulParser<Chardev, ChardevError> = HelpfulParser {
    help: chardev_help,
    parse: str::parse,
};

const MONITOR_PARSER: HelpfulParser<MonitorOption, ChardevError> = HelpfulParser {
    help: monitor_help,
    parse: str::parse,
};

const NBD_SERVER_PARSER: HelpfulParser<NbdServerArgs, QmpError> = HelpfulParser {
    help: |text| option_help(HelpTopic::NbdServer, text),
    parse: parse_nbd_server,
};

const EXPORT_PARSER: HelpfulParser<ExportArgs, QmpError> = HelpfulParser {
    help: |text| option_help(HelpTopic::Export, text),
    parse: parse_export,
};

impl Args for StorageDaemonArgs {
    fn augment_args(command: Command) -> Command {
        Flags::augment_args(command)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Flags::augment_args_for_update(command)
    }
}

impl FromArgMatches for StorageDaemonArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let places = |name: &str| -> Vec<usize> {
            let places = matches.indices_of(name);
            places.into_iter().flatten().collect()
        };
        let flags = Flags::from_arg_matches(matches)?;
        let mut steps = Vec::new();
        steps.extend(at(places("qmp"), flags.qmp, Step::Qmp));
        steps.extend(at(places("chardev"), flags.chardev, Step::Chardev));
        steps.extend(at(places("monitor"), flags.monitor, Step::Monitor));
        let object = |options| Step::Object(Box::new(options));
        steps.extend(at(places("object"), flags.object, object));
        let blockdev = |options| Step::Blockdev(Box::new(options));
        steps.extend(at(places("blockdev"), flags.blockdev, blockdev));
        let nbd_server = |options| Step::NbdServer(Box::new(options));
        steps.extend(at(places("nbd_server"), flags.nbd_server, nbd_server));
        let export = |options| Step::Export(Box::new(options));
        steps.extend(at(places("export"), flags.export, export));
        steps.sort_by_key(|(place, _)| *place);
        Ok(Self {
            steps: steps.into_iter().map(|(_, step)| step).collect(),
            backing_directories: flags.backing_directory,
            pidfile: flags.pidfile,
            daemonize: flags.daemonize,
        })
    }

    fn update_from_arg_matches(&mut self, _matches: &ArgMatches) -> Result<(), clap::Error> {
        Err(clap::Error::new(ErrorKind::ArgumentConflict))
    }
}

/// Values with their places on the command line.
fn at<T>(places: Vec<usize>, values: Vec<T>, step: fn(T) -> Step) -> Vec<(usize, Step)> {
    places
        .into_iter()
        .zip(values.into_iter().map(step))
        .collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: StorageDaemonArgs,
    }

    fn parse(words: &[&str]) -> Result<StorageDaemonArgs, clap::Error> {
        Line::try_parse_from([&["storage-daemon"], words].concat()).map(|line| line.args)
    }

    #[test]
    fn steps_are_in_the_order_of_the_command_line() {
        let args = parse(&[
            "--blockdev=driver=null-co,node-name=a",
            "--object",
            "throttle-group,id=t",
            "--blockdev",
            "driver=null-co,node-name=b",
            "--chardev=socket,path=/s,server=on,wait=off,id=c",
            "--qmp=unix:/q",
            "--monitor",
            "c",
            "--pidfile=p",
            "--export=nbd,id=e,node-name=a",
            "--nbd-server=addr.type=unix,addr.path=/n",
        ])
        .unwrap();
        let kinds: Vec<String> = args
            .steps
            .iter()
            .map(|step| match step {
                Step::Qmp(_) => "qmp".to_owned(),
                Step::Chardev(chardev) => format!("chardev {}", chardev.id),
                Step::Monitor(monitor) => format!("monitor {}", monitor.chardev),
                Step::Object(object) => format!("object {}", object.id()),
                Step::Blockdev(node) => node.node_name.clone().unwrap(),
                Step::NbdServer(_) => "nbd".to_owned(),
                Step::Export(export) => format!("export {}", export.id()),
            })
            .collect();
        assert_eq!(
            kinds,
            [
                "a",
                "object t",
                "b",
                "chardev c",
                "qmp",
                "monitor c",
                "export e",
                "nbd"
            ]
        );
        assert_eq!(args.pidfile, Some("p".into()));
        assert!(!args.daemonize);
    }

    #[test]
    fn a_daemon_that_nobody_could_reach_is_a_mistake() {
        assert!(parse(&[]).is_err());
        assert!(parse(&["--blockdev=driver=null-co,node-name=a"]).is_err());
        assert!(parse(&["--chardev=socket,path=/s,server=on,id=c"]).is_err());
    }
}
