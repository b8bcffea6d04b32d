# A script of integration/sdks: the AWS SDK for Ruby.
#
# Usage: ruby client.rb [port], with the gem aws-sdk-core (Debian: ruby-aws-sdk-core), the environment of a
# pod, and the URL of STS in STS_ENDPOINT. The script writes the name and the version of the SDK. Then it
# reads commands from stdin, one per line, and answers each with a line of JSON:
#
#   call    calls GetCallerIdentity, always with the same client
#   fresh   calls GetCallerIdentity with a new client
#   region  unsupported: the SDK takes the region from variables and files only
#
# Versions before 3.171 do not know AWS_CONTAINER_CREDENTIALS_FULL_URI. Versions before 2024-04 take the
# address of the metadata service from AWS_EC2_METADATA_SERVICE_ENDPOINT, but not the port: they call port 80.
# With the argument "port" the script passes the port to the SDK, as a program must to get credentials from
# the sidecar. It never writes a secret key or a session token.

require 'json'
require 'uri'
require 'aws-sdk-core'

abort 'usage: client.rb [port]' unless [[], ['port']].include?(ARGV)

# A client for STS, with the default chain of credentials unless the argument is "port".
class Caller
  def initialize
    options = { endpoint: ENV.fetch('STS_ENDPOINT') }
    if ARGV == ['port']
      port = URI(ENV.fetch('AWS_EC2_METADATA_SERVICE_ENDPOINT')).port
      options[:credentials] = Aws::InstanceProfileCredentials.new(port: port)
    end
    @sts = Aws::STS::Client.new(options)
  end

  def call
    response = @sts.get_caller_identity
    authorization = response.context.http_request.headers['authorization']
    { arn: response.arn, access_key_id: authorization[%r{Credential=([^/]+)/}, 1] }
  end
end

def answer(command)
  case command
  when 'call' then (@kept ||= Caller.new).call
  when 'fresh' then Caller.new.call
  when 'region' then { error: 'unsupported' }
  else { error: "no such command: #{command}" }
  end
rescue Aws::Errors::ServiceError => e
  { error: e.message, code: e.code }
rescue StandardError => e
  { error: e.message, code: e.class.name }
end

def write(line)
  puts JSON.generate(line)
end

$stdout.sync = true
write({ client: 'ruby', version: Aws::CORE_GEM_VERSION })
$stdin.each_line { |line| write(answer(line.strip)) }
