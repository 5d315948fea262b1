// SPDX-License-Identifier: GPL-2.0-or-later

//! Who this host is to the other one: keys that two hosts have, and nobody else.
//!
//! A [`Pair`] is made at once and whole: an authority that signs two identities and is then thrown
//! away, so that nobody can ever sign a third. Each host gets one half, an [`Identity`]: its
//! certificate, its private key and the authority's certificate, in one PEM file.
//!
//! A host accepts a certificate that this authority signed and that carries the *other* name of the
//! pair, never its own: what it sends cannot be turned back on it. The stock verifiers of rustls do
//! all of this but the client's name, which [`OtherHalf`] adds.

use std::fmt;
use std::fs::{File, Metadata};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{anyhow, bail, ensure, Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerifier};
use rustls::client::{verify_server_name, Resumption, WebPkiServerVerifier};
use rustls::crypto::{ring, CryptoProvider};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig,
    SignatureScheme,
};
use serde::Serialize;

/// How long a pair is valid, and how far back it begins: clocks may differ a little.
const VALID: Duration = Duration::from_secs(3652 * 24 * 3600);
const BEFORE: Duration = Duration::from_secs(24 * 3600);
/// Most bytes in a file of keys.
pub const FILE_MAX: u64 = 1 << 16;
/// What to do about keys that do not fit the other host's.
pub const MAKE: &str =
    "make one pair with remusctl keys make, install one half here and the other half there";

/// The cryptography, in this one place: ring, TLS 1.3's suites in an order that favours speed.
pub fn provider() -> CryptoProvider {
    use ring::cipher_suite::{
        TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
    };
    CryptoProvider {
        cipher_suites: vec![
            TLS13_AES_128_GCM_SHA256,
            TLS13_AES_256_GCM_SHA384,
            TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..ring::default_provider()
    }
}

/// Two halves that belong together, as the text of their files. Whoever has one of these is that host.
pub struct Pair {
    /// Names and files of the two.
    pub halves: [(String, String); 2],
}

impl Pair {
    /// Makes new keys for two hosts of these names.
    pub fn make(one: &str, other: &str) -> Result<Self> {
        let now = SystemTime::now();
        Self::make_for(one, other, now - BEFORE, now + VALID)
    }

    /// Makes keys that are valid from `start` to `end`.
    pub fn make_for(one: &str, other: &str, start: SystemTime, end: SystemTime) -> Result<Self> {
        for name in [one, other] {
            check_name(name)?;
        }
        ensure!(one != other, "the two halves need different names");
        let since = |t: SystemTime| t.duration_since(UNIX_EPOCH).unwrap_or_default();
        let params = |common: String, names: &[&str]| -> Result<CertificateParams> {
            let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
            let mut params = CertificateParams::new(names)?;
            params.not_before = rcgen::date_time_ymd(1970, 1, 1) + since(start);
            params.not_after = rcgen::date_time_ymd(1970, 1, 1) + since(end);
            params.distinguished_name = DistinguishedName::new();
            params.distinguished_name.push(DnType::CommonName, common);
            Ok(params)
        };
        // It carries both names, by which each half knows what the other is called.
        let mut top = params(format!("Remus pair {one} {other}"), &[one, other])?;
        top.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        top.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let top = CertifiedIssuer::self_signed(top, KeyPair::generate()?)?;
        let half = |name: &str| -> Result<(String, String)> {
            let mut params = params(format!("Remus host {name}"), &[name])?;
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            params.extended_key_usages = vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ];
            let key = KeyPair::generate()?;
            let own = params.signed_by(&key, &top)?;
            let text = format!("{}{}{}", own.pem(), key.serialize_pem(), top.pem());
            Ok((name.to_owned(), text))
        };
        let halves = [half(one)?, half(other)?];
        Ok(Self { halves })
    }
}

/// Fails unless a half of a pair may be called `name`.
pub fn check_name(name: &str) -> Result<()> {
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && l.bytes()
                .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    let fits = name.len() <= 200
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.split('.').all(label)
        && ServerName::try_from(name).is_ok();
    ensure!(
        fits,
        "{name:?} cannot be a name in a pair: use letters a-z, digits, - and ., a letter first"
    );
    Ok(())
}

/// One half of a pair, ready for use.
pub struct Identity {
    description: Description,
    own: CertificateDer<'static>,
    own_name: ServerName<'static>,
    other_name: ServerName<'static>,
    verifier: Arc<WebPkiServerVerifier>,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

/// What a person may know of an identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Description {
    /// What this host is called.
    pub name: String,
    /// What the other one is called.
    pub peer: String,
    /// First day on which it is valid.
    pub not_before: String,
    /// Last day.
    pub not_after: String,
    /// SHA-256 of this host's certificate.
    pub fingerprint: String,
    /// SHA-256 of what both halves have in common: equal on both hosts.
    pub pair_fingerprint: String,
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "this host    {}", self.name)?;
        writeln!(f, "other host   {}", self.peer)?;
        writeln!(f, "valid        {} to {}", self.not_before, self.not_after)?;
        writeln!(f, "certificate  SHA-256 {}", self.fingerprint)?;
        write!(
            f,
            "pair         SHA-256 {} (the same on both hosts)",
            self.pair_fingerprint
        )
    }
}

impl Identity {
    /// Reads a file of keys, and fails unless only its owner can read it and it is valid now.
    pub fn load(path: &Path) -> Result<Self> {
        let identity = Self::read(path)?;
        let told = || path.display().to_string();
        identity.check_valid(UnixTime::now()).with_context(told)?;
        Ok(identity)
    }

    /// Reads a file of keys, whenever it is valid.
    pub fn read(path: &Path) -> Result<Self> {
        let shown = path.display();
        let file = File::open(path).map_err(|e| match e.kind() {
            ErrorKind::NotFound => anyhow!(
                "there are no keys in {shown}: make a pair with remusctl keys pair --to HOST, or \
                 install one with remusctl keys install"
            ),
            _ => anyhow!("cannot read the keys in {shown}: {e}"),
        })?;
        let meta = file.metadata().with_context(|| shown.to_string())?;
        check_private(path, &meta)?;
        let mut text = Vec::new();
        file.take(FILE_MAX + 1)
            .read_to_end(&mut text)
            .with_context(|| format!("cannot read the keys in {shown}"))?;
        Self::parse(&text).with_context(|| {
            format!("{shown} is not a whole identity of remusctl keys: install it again")
        })
    }

    /// Takes the text of a file of keys.
    pub fn parse(text: &[u8]) -> Result<Self> {
        ensure!(text.len() as u64 <= FILE_MAX, "it is too long");
        let certificates: Vec<_> = CertificateDer::pem_slice_iter(text)
            .collect::<Result<_, _>>()
            .map_err(|e| anyhow!("damaged certificate ({e:?})"))?;
        let Ok([own, top]) = <[CertificateDer<'static>; 2]>::try_from(certificates) else {
            bail!("it has to hold two certificates");
        };
        let key = PrivateKeyDer::from_pem_slice(text)
            .map_err(|e| anyhow!("missing or damaged private key ({e:?})"))?;

        let of_own = names(&own)?;
        let of_pair = names(&top)?;
        let ([name], [one, other]) = (of_own.as_slice(), of_pair.as_slice()) else {
            bail!("the certificates do not name two hosts");
        };
        let peer = match name {
            n if n == one => other,
            n if n == other => one,
            _ => bail!("the certificates do not belong together"),
        };
        ensure!(name != peer, "the certificates name only one host");
        let server_name = |n: &str| ServerName::try_from(n.to_owned()).context("bad name");
        let (own_name, other_name) = (server_name(name)?, server_name(peer)?);

        let mut roots = RootCertStore::empty();
        roots.add(top.clone()).context("damaged certificate")?;
        let roots = Arc::new(roots);
        let provider = Arc::new(provider());
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
                .build()?;
        let other_half = OtherHalf {
            stock: WebPkiClientVerifier::builder_with_provider(
                Arc::clone(&roots),
                Arc::clone(&provider),
            )
            .build()?,
            name: other_name.clone(),
        };

        let chain = vec![own.clone()];
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .context("the private key is not this certificate's")?;
        client.resumption = Resumption::disabled();
        // The name is nobody else's business.
        client.enable_sni = false;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(Arc::new(other_half))
            .with_single_cert(chain, key)
            .context("the private key is not this certificate's")?;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;

        let mut identity = Self {
            description: Description {
                name: name.clone(),
                peer: peer.clone(),
                not_before: String::new(),
                not_after: String::new(),
                fingerprint: fingerprint(&own),
                pair_fingerprint: fingerprint(&top),
            },
            own,
            own_name,
            other_name,
            verifier,
            client: Arc::new(client),
            server: Arc::new(server),
        };
        let (start, end) = identity.validity()?;
        identity.description.not_before = day(start);
        identity.description.not_after = day(end);
        Ok(identity)
    }

    /// What is to be shown of it.
    pub fn describe(&self) -> &Description {
        &self.description
    }

    /// What this host is called.
    pub fn name(&self) -> &str {
        &self.description.name
    }

    /// What the other host is called.
    pub fn peer(&self) -> &str {
        &self.description.peer
    }

    /// Fails unless it is valid now.
    pub fn check(&self) -> Result<()> {
        self.check_valid(UnixTime::now())
    }

    /// The name that the other host has to show.
    pub fn other_name(&self) -> ServerName<'static> {
        self.other_name.clone()
    }

    /// How this host opens connections.
    pub fn client(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.client)
    }

    /// How this host takes connections.
    pub fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    /// What the stock verifier says of this host's own certificate at a time.
    fn verify(&self, at: UnixTime) -> Result<(), rustls::Error> {
        self.verifier
            .verify_server_cert(&self.own, &[], &self.own_name, &[], at)
            .map(drop)
    }

    /// What the other host would say of this one's certificate now.
    #[cfg(test)]
    pub fn verify_own(&self) -> Result<(), rustls::Error> {
        self.verify(UnixTime::now())
    }

    fn check_valid(&self, at: UnixTime) -> Result<()> {
        match self.verify(at) {
            Ok(()) => Ok(()),
            Err(rustls::Error::InvalidCertificate(e)) => match untimely(&e) {
                Some(Untimely::Early { start, now }) => bail!(
                    "these keys are valid only from {start} on, and this host's clock says {now}: set the clock"
                ),
                Some(Untimely::Late { end, now }) => bail!(
                    "these keys were valid until {end}, and this host's clock says {now}: set the clock if \
                     it is wrong, else {MAKE}"
                ),
                None => bail!("the certificates do not belong together ({e})"),
            },
            Err(e) => bail!("the certificates do not belong together ({e})"),
        }
    }

    /// First and last moment of validity, as the verifier tells them to who is too early or too late.
    fn validity(&self) -> Result<(UnixTime, UnixTime)> {
        let at = |seconds| self.verify(UnixTime::since_unix_epoch(Duration::from_secs(seconds)));
        let start = match at(0) {
            Err(rustls::Error::InvalidCertificate(CertificateError::NotValidYetContext {
                not_before,
                ..
            })) => not_before,
            Err(e) => bail!("the certificates do not belong together ({e})"),
            Ok(()) => bail!("a certificate without a beginning"),
        };
        // The year 9999, the last that a certificate can say.
        let end = match at(253_402_300_799) {
            Err(rustls::Error::InvalidCertificate(CertificateError::ExpiredContext {
                not_after,
                ..
            })) => not_after,
            Err(e) => bail!("the certificates do not belong together ({e})"),
            Ok(()) => bail!("a certificate without an end"),
        };
        Ok((start, end))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.description.fmt(f)
    }
}

/// Why a certificate is not valid now.
pub enum Untimely {
    /// Before its time.
    Early {
        /// Day on which it begins.
        start: String,
        /// Day that the clock says.
        now: String,
    },
    /// After it.
    Late {
        /// Day on which it ended.
        end: String,
        /// Day that the clock says.
        now: String,
    },
}

/// Whether a certificate was refused for its time alone.
pub fn untimely(e: &CertificateError) -> Option<Untimely> {
    match e {
        CertificateError::NotValidYetContext { time, not_before } => Some(Untimely::Early {
            start: day(*not_before),
            now: day(*time),
        }),
        CertificateError::ExpiredContext { time, not_after } => Some(Untimely::Late {
            end: day(*not_after),
            now: day(*time),
        }),
        _ => None,
    }
}

/// The stock verifier of clients, which asks for the right name too.
#[derive(Debug)]
struct OtherHalf {
    stock: Arc<dyn ClientCertVerifier>,
    name: ServerName<'static>,
}

impl ClientCertVerifier for OtherHalf {
    fn root_hint_subjects(&self) -> &[rustls::DistinguishedName] {
        self.stock.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self
            .stock
            .verify_client_cert(end_entity, intermediates, now)?;
        verify_server_name(&ParsedCertificate::try_from(end_entity)?, &self.name)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.stock.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.stock.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.stock.supported_verify_schemes()
    }
}

/// Fails unless the file is one that nobody else can read or change.
fn check_private(path: &Path, meta: &Metadata) -> Result<()> {
    let shown = path.display();
    ensure!(meta.is_file(), "{shown} is not a file");
    let uid = rustix::process::geteuid().as_raw();
    ensure!(
        meta.uid() == uid || meta.uid() == 0,
        "the keys in {shown} belong to another user: chown them to root, and make new ones if they \
         may be known"
    );
    let mode = meta.mode() & 0o777;
    ensure!(
        mode & 0o077 == 0,
        "others can read the keys in {shown} (mode {mode:03o}): chmod 600 {shown}, and make new ones \
         if they may be known"
    );
    Ok(())
}

/// The names in a certificate.
fn names(certificate: &CertificateDer<'_>) -> Result<Vec<String>> {
    let parsed = webpki::EndEntityCert::try_from(certificate)
        .map_err(|e| anyhow!("damaged certificate ({e})"))?;
    Ok(parsed.valid_dns_names().map(str::to_owned).collect())
}

/// SHA-256 of a certificate, the way other tools print it.
fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    let suite = ring::cipher_suite::TLS13_AES_128_GCM_SHA256;
    let Some(suite) = suite.tls13() else {
        return String::new();
    };
    let hash = suite.common.hash_provider.hash(certificate);
    let bytes: Vec<String> = hash.as_ref().iter().map(|b| format!("{b:02X}")).collect();
    bytes.join(":")
}

/// A day, such as 2026-11-21.
fn day(at: UnixTime) -> String {
    let date = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(at.as_secs());
    date.date().to_string()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    fn write(dir: &Path, text: &str, mode: u32) -> std::path::PathBuf {
        let path = dir.join("default.pem");
        // It may be one that cannot be written.
        let _ = fs::remove_file(&path);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn two_halves_know_each_other() {
        let pair = Pair::make("alpha", "beta.example.org").unwrap();
        let [a, b] = &pair.halves;
        let a = Identity::parse(a.1.as_bytes()).unwrap();
        let b = Identity::parse(b.1.as_bytes()).unwrap();
        assert_eq!((a.name(), a.peer()), ("alpha", "beta.example.org"));
        assert_eq!((b.name(), b.peer()), ("beta.example.org", "alpha"));
        let (a, b) = (a.describe(), b.describe());
        assert_eq!(a.pair_fingerprint, b.pair_fingerprint);
        assert_ne!(a.fingerprint, b.fingerprint);
        assert_eq!(a.fingerprint.len(), 95);
        assert!(a.to_string().contains("other host   beta"), "{a}");
        let later = UnixTime::since_unix_epoch(
            (SystemTime::now() + VALID)
                .duration_since(UNIX_EPOCH)
                .unwrap(),
        );
        assert!(
            [
                day(UnixTime::since_unix_epoch(Duration::from_secs(
                    later.as_secs() - 3600
                ))),
                day(later)
            ]
            .contains(&a.not_after),
            "{a}"
        );
    }

    #[test]
    fn names_that_work() {
        for name in ["a", "b", "alpha-2", "x1.example.org"] {
            check_name(name).unwrap();
        }
        for name in [
            "",
            "A",
            "1",
            "a b",
            "a_b",
            "-a",
            "a-",
            "a..b",
            "a.",
            "127.0.0.1",
            "a\n",
            "*.a",
        ] {
            assert!(check_name(name).is_err(), "{name}");
        }
        assert!(Pair::make("a", "a").is_err());
    }

    /// The private key of the authority is in neither file, nor does one hold the other's.
    #[test]
    fn each_file_has_one_key() {
        let pair = Pair::make("a", "b").unwrap();
        let key = |text: &str| {
            assert_eq!(text.matches("PRIVATE KEY-----").count(), 2);
            PrivateKeyDer::from_pem_slice(text.as_bytes()).unwrap()
        };
        let [a, b] = &pair.halves;
        assert_ne!(key(&a.1).secret_der(), key(&b.1).secret_der());
    }

    #[test]
    fn files_that_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let error = |path: &Path| format!("{:#}", Identity::load(path).unwrap_err());
        assert!(error(&dir.join("none.pem")).contains("there are no keys in"));
        assert!(error(dir).contains("is not a file"));
        let text = &Pair::make("a", "b").unwrap().halves[0].1;
        Identity::load(&write(dir, text, 0o600)).unwrap();
        Identity::load(&write(dir, text, 0o400)).unwrap();
        for mode in [0o640, 0o604, 0o620, 0o601] {
            assert!(
                error(&write(dir, text, mode)).contains("chmod 600"),
                "{mode:o}"
            );
        }
        let other = &Pair::make("a", "b").unwrap().halves[0].1;
        let part = |text: &str, n: usize| {
            let marked = text.replace("-----BEGIN", "\0-----BEGIN");
            marked.split('\0').nth(n + 1).unwrap().to_owned()
        };
        let joined = |parts: &[(&str, usize)]| -> String {
            parts.iter().map(|(t, n)| part(t, *n)).collect()
        };
        for (bad, why) in [
            (String::new(), "two certificates"),
            ("-----BEGIN CERTIFICATE-----\n".to_owned(), "damaged"),
            (text.replacen('M', "!", 3), "damaged"),
            (text[..text.len() / 2].to_owned(), "not a whole identity"),
            (joined(&[(text, 0), (text, 2)]), "private key"),
            (joined(&[(text, 0), (text, 1)]), "two certificates"),
            (
                joined(&[(text, 0), (other, 1), (text, 2)]),
                "not this certificate's",
            ),
            (
                joined(&[(text, 0), (text, 1), (other, 2)]),
                "do not belong together",
            ),
            (
                joined(&[(text, 0), (text, 1), (text, 0)]),
                "do not name two hosts",
            ),
            ("x".repeat(70_000), "too long"),
        ] {
            let said = error(&write(dir, &bad, 0o600));
            assert!(said.contains(why), "{why}: {said}");
        }
    }

    #[test]
    fn only_in_its_time() {
        let dir = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        let early = Pair::make_for("a", "b", now + DAY, now + 9 * DAY).unwrap();
        let late = Pair::make_for("a", "b", now - 9 * DAY, now - DAY).unwrap();
        let error = |pair: &Pair| {
            let path = write(dir.path(), &pair.halves[1].1, 0o600);
            // It can still be shown.
            Identity::read(&path).unwrap();
            format!("{:#}", Identity::load(&path).unwrap_err())
        };
        let before = day(UnixTime::now());
        let said = error(&early);
        // Midnight may have passed.
        let today = [before, day(UnixTime::now())];
        assert!(
            said.contains("valid only from") && today.iter().any(|d| said.contains(d)),
            "{said}"
        );
        let said = error(&late);
        assert!(
            said.contains("were valid until") && said.contains("keys make"),
            "{said}"
        );
    }
}
